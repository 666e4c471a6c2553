//! Spans of the work on pods, all with the ids of what they are about. An *act* is a whole piece of work; its ids stand in every
//! line that is logged inside. Acts consist of *steps*, which only a debug log names. An exported trace has both.
//!
//! A span is below that of the request which wanted the work ([`super::parts::Reply`] carries it), never below an owner's: an
//! owner lives as long as its pod, and a span ends when nobody holds it any more.

/// A whole piece of work on a pod or container.
macro_rules! act_span {
    ($name:literal, $pod:expr) => {
        tracing::info_span!($name, pod = %$pod)
    };
    ($name:literal, $pod:expr, $container:expr) => {
        tracing::info_span!($name, pod = %$pod, container = %$container)
    };
}

/// One step of an act.
macro_rules! step_span {
    ($name:literal, $pod:expr) => {
        tracing::debug_span!($name, pod = %$pod)
    };
    ($name:literal, $pod:expr, $container:expr) => {
        tracing::debug_span!($name, pod = %$pod, container = %$container)
    };
}

pub(super) use {act_span, step_span};
