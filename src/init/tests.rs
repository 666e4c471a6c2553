//! Whole containers, made for real.
