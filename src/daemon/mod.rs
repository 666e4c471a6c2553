//! F8: the daemon and the operator's commands: the only reader of file, flags and environment.
