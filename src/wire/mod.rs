//! F0: generated code and nothing else.

pub mod cri;
pub mod operator;
