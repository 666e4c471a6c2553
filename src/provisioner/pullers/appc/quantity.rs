//! Amounts as isolators write them: `500m`, `1.5`, `512M`, `2Gi`.

use serde_json::Value;

/// In which unit the result is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// `1` is 1000.
    Thousandths,
    /// `1` is 1; parts are rounded up.
    Whole,
}

/// Suffixes and how many thousandths each stands for.
const SUFFIXES: &[(&str, u128)] = &[
    ("Ki", 1000 << 10),
    ("Mi", 1000 << 20),
    ("Gi", 1000 << 30),
    ("Ti", 1000 << 40),
    ("Pi", 1000 << 50),
    ("m", 1),
    ("k", 1_000_000),
    ("K", 1_000_000),
    ("M", 1_000_000_000),
    ("G", 1_000_000_000_000),
    ("T", 1_000_000_000_000_000),
    ("P", 1_000_000_000_000_000_000),
    ("", 1000),
];
/// Most digits before and behind the point.
const MAX_DIGITS: usize = 18;

/// Reads a text or number. `None` for what is none, is negative, or is beyond all machines.
pub fn parse(value: &Value, scale: Scale) -> Option<u64> {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => return None,
    };
    let (number, unit) = SUFFIXES.iter().find_map(|(suffix, unit)| text.strip_suffix(suffix).map(|number| (number, *unit)))?;
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.len() <= MAX_DIGITS && text.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(part) {
        return None;
    }
    let power = 10u128.pow(u32::try_from(part.len()).ok()?);
    let mantissa: u128 = format!("{whole}{part}").parse().ok()?;
    // Thousandths, rounded up: a limit of the smallest amount is not none.
    let thousandths = mantissa.checked_mul(unit)?.div_ceil(power);
    let result = match scale {
        Scale::Thousandths => thousandths,
        Scale::Whole => thousandths.div_ceil(1000),
    };
    u64::try_from(result).ok().filter(|n| i64::try_from(*n).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn suffixes_and_fractions() {
        for (value, whole, thousandths) in [
            (json!("1"), 1, 1000),
            (json!(2), 2, 2000),
            (json!("250m"), 1, 250),
            (json!("1.5"), 2, 1500),
            (json!("0.0001"), 1, 1),
            (json!("1G"), 1_000_000_000, 1_000_000_000_000),
            (json!("2Gi"), 2 << 30, 2000 << 30),
            (json!("1.5Ki"), 1536, 1_536_000),
            (json!("64K"), 64_000, 64_000_000),
        ] {
            assert_eq!(parse(&value, Scale::Whole), Some(whole), "{value}");
            assert_eq!(parse(&value, Scale::Thousandths), Some(thousandths), "{value}");
        }
        for bad in [
            json!("-1"),
            json!(""),
            json!("m"),
            json!("1 G"),
            json!("1e3"),
            json!("."),
            json!(".5"),
            json!(true),
            json!(null),
            json!("9999999999P"),
            json!("1.5.5"),
            json!(-3),
        ] {
            assert_eq!(parse(&bad, Scale::Whole), None, "{bad}");
        }
    }
}
