//! Names of signals as images write them.

use std::str::FromStr;

use nix::sys::signal::Signal;

/// First and last real-time signal as programs see them (glibc keeps 32 and 33 to itself).
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`, `RTMAX-2`, any case. `None` for what is no signal.
pub fn parse(text: &str) -> Option<i32> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    // `u8` and digits only: a sign before the number is no name of a signal.
    let number = |digits: &str| digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse::<u8>().ok()).flatten().map(i32::from);
    let signal = match name {
        "RTMIN" => RTMIN,
        "RTMAX" => RTMAX,
        _ => {
            if let Some(offset) = name.strip_prefix("RTMIN+") {
                RTMIN + number(offset)?
            } else if let Some(offset) = name.strip_prefix("RTMAX-") {
                RTMAX - number(offset)?
            } else if let Some(number) = number(&upper) {
                return (1..=RTMAX).contains(&number).then_some(number);
            } else {
                return Signal::from_str(&format!("SIG{name}")).ok().map(|s| s as i32);
            }
        }
    };
    (RTMIN..=RTMAX).contains(&signal).then_some(signal)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn names_numbers_and_real_time_signals() {
        for (text, signal) in
            [("SIGTERM", 15), ("term", 15), ("9", 9), ("SIGRTMIN+3", 37), ("rtmin", 34), ("SIGRTMAX-2", 62), ("RTMAX", 64), ("64", 64), ("QUIT", 3)]
        {
            assert_eq!(parse(text), Some(signal), "{text}");
        }
        for bad in ["", "SIG", "0", "65", "256", "-9", "+9", "SIG9", "SIGNOPE", "SIGRTMIN+31", "SIGRTMIN-1", "RTMAX-31", "RTMIN+", "RTMIN+-1", "9 "] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}
