//! Stop signals. The numbers of the wire enum are its own, so signals are translated by name (cri-behaviour §7).

use std::sync::LazyLock;

use crate::wire::cri as wire;

/// First and last real-time signal as containers see them: glibc keeps 32 and 33 for itself.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;
/// Highest value of the wire enum.
const LAST: i32 = wire::Signal::Sigrtmax as i32;

/// Linux number by wire number; 0 where there is none.
static NUMBERS: LazyLock<Vec<i32>> = LazyLock::new(|| (0..=LAST).map(|v| wire::Signal::try_from(v).map_or(0, |s| by_name(s.as_str_name()))).collect());

fn by_name(name: &str) -> i32 {
    let offset = |n: &str| n.parse::<i32>().unwrap_or_default();
    if let Some(n) = name.strip_prefix("SIGRTMINPLUS") {
        return RTMIN + offset(n);
    }
    if let Some(n) = name.strip_prefix("SIGRTMAXMINUS") {
        return RTMAX - offset(n);
    }
    match name {
        "SIGRTMIN" => RTMIN,
        "SIGRTMAX" => RTMAX,
        // Second names, which the standard table does not list.
        "SIGCLD" => libc::SIGCHLD,
        "SIGIOT" => libc::SIGABRT,
        "SIGPOLL" => libc::SIGIO,
        _ => name.parse::<nix::sys::signal::Signal>().map_or(0, |s| s as i32),
    }
}

/// Linux number of a wire signal; `None` for "not said".
pub fn to_number(signal: wire::Signal) -> Option<i32> {
    NUMBERS.get(signal as usize).copied().filter(|n| *n != 0)
}

/// Wire signal of a Linux number; "not said" when the enum has no name for it.
pub fn from_number(number: i32) -> wire::Signal {
    let found = NUMBERS.iter().position(|n| *n == number && number != 0).unwrap_or_default();
    i32::try_from(found).ok().and_then(|v| wire::Signal::try_from(v).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_its_linux_number() {
        for (signal, number) in [
            (wire::Signal::Sigint, 2),
            (wire::Signal::Sigterm, 15),
            (wire::Signal::Sigkill, 9),
            (wire::Signal::Sigusr1, 10),
            (wire::Signal::Sigcld, 17),
            (wire::Signal::Sigiot, 6),
            (wire::Signal::Sigpoll, 29),
            (wire::Signal::Sigrtmin, 34),
            (wire::Signal::Sigrtminplus3, 37),
            (wire::Signal::Sigrtmaxminus2, 62),
            (wire::Signal::Sigrtmax, 64),
        ] {
            assert_eq!(to_number(signal), Some(number), "{signal:?}");
        }
        assert_eq!(to_number(wire::Signal::RuntimeDefault), None);
        assert!(NUMBERS.iter().skip(1).all(|n| *n > 0), "{NUMBERS:?}");
    }

    #[test]
    fn every_linux_number_finds_its_first_name() {
        for number in (1..=31).chain(RTMIN..=RTMAX) {
            assert_eq!(to_number(from_number(number)), Some(number));
        }
        assert_eq!(from_number(libc::SIGCHLD), wire::Signal::Sigchld);
        assert_eq!(from_number(0), wire::Signal::RuntimeDefault);
        assert_eq!(from_number(33), wire::Signal::RuntimeDefault);
    }
}
