//! Policy: which request fits which state. Pure functions of (state, request), so that the whole table is on one screen.

use crate::model::error::{Error, Kind};
use crate::model::phase::{ContainerPhase, PodPhase};

/// What is asked of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// Let its first process go.
    Start,
    /// End it.
    Stop,
    /// Run a command inside.
    Exec,
    /// New log file.
    ReopenLog,
    /// New limits.
    Update,
    /// Make it go away.
    Remove,
}

/// Where a container stands, as far as policy cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Being made.
    Creating,
    /// Made, not started.
    Created,
    /// A start is under way.
    Starting,
    /// Running.
    Running,
    /// Ended.
    Exited,
    /// The shim cannot say.
    Unknown,
    /// Being removed, whatever it was before.
    Removing,
}

impl Standing {
    /// From the phase and what is under way.
    pub(super) fn of(phase: &ContainerPhase, starting: bool, removing: bool) -> Self {
        match phase {
            _ if removing => Self::Removing,
            _ if starting => Self::Starting,
            ContainerPhase::Creating => Self::Creating,
            ContainerPhase::Created { .. } => Self::Created,
            ContainerPhase::Running { .. } => Self::Running,
            ContainerPhase::Exited { .. } => Self::Exited,
            ContainerPhase::Unknown { .. } => Self::Unknown,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Exited => "exited",
            Self::Unknown => "unknown",
            Self::Removing => "removing",
        }
    }
}

/// A request that may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admit {
    /// Do it.
    Act,
    /// It is so already: answer at once.
    Nothing,
    /// After what is under way has ended; then ask again.
    Later,
}

/// A request that does not fit the state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Denied {
    /// Container in the wrong state.
    #[error("container is in {} state, {needs}", state.name())]
    Container {
        /// Where it stands.
        state: Standing,
        /// Where it would have to stand.
        needs: &'static str,
    },
    /// Pod in the wrong state.
    #[error("pod is not ready: {0}")]
    Pod(&'static str),
}

impl Denied {
    /// As an error about `object`.
    pub(super) fn about(self, act: &str, object: impl std::fmt::Display) -> Error {
        Error::with(Kind::FailedPrecondition, format!("{act} {object}"), self)
    }
}

/// Containers.
pub(super) fn container(standing: Standing, ask: Ask) -> Result<Admit, Denied> {
    use Standing::{Created, Creating, Exited, Removing, Running, Starting, Unknown};
    let denied = |needs| Err(Denied::Container { state: standing, needs });
    match (ask, standing) {
        (Ask::Start, Created) => Ok(Admit::Act),
        (Ask::Start, _) => denied("only a created one can be started"),

        (Ask::Stop, Running | Unknown) => Ok(Admit::Act),
        (Ask::Stop, Starting) => Ok(Admit::Later),
        (Ask::Stop, Creating | Created | Exited) => Ok(Admit::Nothing),
        (Ask::Stop, Removing) => Ok(Admit::Act),

        (Ask::Exec | Ask::ReopenLog, Running) => Ok(Admit::Act),
        (Ask::Exec | Ask::ReopenLog, _) => denied("it must be running"),

        (Ask::Update, Created | Running) => Ok(Admit::Act),
        (Ask::Update, Starting) => Ok(Admit::Later),
        (Ask::Update, _) => denied("it must be created or running"),

        // Also while it starts: the removal then waits for the start's end by itself.
        (Ask::Remove, _) => Ok(Admit::Act),
    }
}

/// New containers: only in a ready pod that is not being stopped.
pub(super) fn create_container(phase: PodPhase, stopping: bool) -> Result<(), Denied> {
    match phase {
        PodPhase::Ready if !stopping => Ok(()),
        PodPhase::Ready => Err(Denied::Pod("it is being stopped")),
        PodPhase::Creating => Err(Denied::Pod("it is being made")),
        PodPhase::NotReady => Err(Denied::Pod("it was stopped or its sandbox ended")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::phase::Exit;
    use proptest::prelude::*;

    fn phases() -> impl Strategy<Value = ContainerPhase> {
        prop_oneof![
            Just(ContainerPhase::Creating),
            any::<u32>().prop_map(|pid| ContainerPhase::Created { pid }),
            any::<(u32, i64)>().prop_map(|(pid, started_at)| ContainerPhase::Running { pid, started_at }),
            any::<(i64, i32, bool)>().prop_map(|(at, code, oom)| ContainerPhase::Exited { started_at: at, exit: Exit::of_process(code, at, oom) }),
            any::<i64>().prop_map(|started_at| ContainerPhase::Unknown { started_at }),
        ]
    }

    fn asks() -> impl Strategy<Value = Ask> {
        prop_oneof![Just(Ask::Start), Just(Ask::Stop), Just(Ask::Exec), Just(Ask::ReopenLog), Just(Ask::Update), Just(Ask::Remove)]
    }

    proptest! {
        #![proptest_config(crate::stdx::testing::cases(256))]
        /// Nothing ever runs again, starts twice, or is entered or changed after its end.
        #[test]
        fn illegal_moves_are_denied(phase in phases(), starting: bool, removing: bool, ask in asks()) {
            let answer = container(Standing::of(&phase, starting, removing), ask);
            let idle = !starting && !removing;
            let (created, running) = (matches!(phase, ContainerPhase::Created { .. }), matches!(phase, ContainerPhase::Running { .. }));
            match ask {
                Ask::Start => prop_assert_eq!(answer == Ok(Admit::Act), idle && created),
                Ask::Exec | Ask::ReopenLog => prop_assert_eq!(answer.is_ok(), idle && running),
                Ask::Update => {
                    prop_assert_eq!(answer == Ok(Admit::Act), idle && (created || running));
                    prop_assert_eq!(answer == Ok(Admit::Later), starting && !removing);
                }
                // Stop and remove are never refused: callers repeat them until they get an OK.
                Ask::Stop | Ask::Remove => prop_assert!(answer.is_ok()),
            }
            if let Err(denied) = answer {
                let error = denied.about("act on container", "x");
                prop_assert_eq!(error.kind, Kind::FailedPrecondition);
                prop_assert!(error.to_string().starts_with("act on container x: container is in "));
            }
        }

        #[test]
        fn only_a_ready_pod_takes_containers(ready: bool, creating: bool, stopping: bool) {
            let phase = if ready { PodPhase::Ready } else if creating { PodPhase::Creating } else { PodPhase::NotReady };
            prop_assert_eq!(create_container(phase, stopping).is_ok(), ready && !stopping);
        }
    }
}
