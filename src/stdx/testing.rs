//! How properties are tested: the same cases every time, so that a run fails for what was changed and not by chance.
//!
//! `PROPTEST_RNG_SEED=n` tries others, `PROPTEST_CASES=n` more of them.

use proptest::test_runner::{Config, RngSeed};

/// So many cases, unless the environment says otherwise.
pub fn cases(number: u32) -> Config {
    let mut config = Config { failure_persistence: None, ..Config::default() };
    if config.rng_seed == RngSeed::Random {
        config.rng_seed = RngSeed::Fixed(1);
    }
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = number;
    }
    config
}
