//! Whole containers, made for real from the host's busybox, and asserted from inside: what they print.

mod basics;
mod harness;
mod security;
mod storage;
