//! Durations, amounts of memory and of CPU, as Kubernetes and systemd users write them.
//!
//! Owns their spelling and the bounds within which they make sense. Never knows which field they are for.

use std::time::Duration;

use crate::{
    fault::quoted,
    reader::found,
    source::Report,
    tree::{Node, Value},
};

const UNITS: &[(&str, u64)] = &[
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
];

/// The least memory for which a process can start at all, and the most that makes sense.
const MEMORY: (u64, u64) = (1 << 20, 1 << 50);
/// The kernel's least quota is 1 ms in each 100 ms; the most is one thousand CPUs.
const CPU_MILLIS: (u32, u32) = (10, 1_000_000);

/// A duration such as `10s`, `1m 30s` or `500ms`.
pub(crate) fn duration(
    node: &Node,
    what: &str,
    (least, most): (Duration, Duration),
    report: &mut Report<'_>,
) -> Option<Duration> {
    let show = humantime::format_duration;
    let range = format!("write a duration from {} to {}, such as 10s or 1m30s", show(least), show(most));
    let parsed = match &node.value {
        Value::Text(text) => humantime::parse_duration(text).ok(),
        // Nothing is zero in every unit.
        Value::Int(0) => Some(Duration::ZERO),
        Value::Int(number) if (1..=86_400).contains(number) => {
            report.fault(
                &node.at,
                format!("{what} has no unit"),
                format!("write {number}s for seconds, {number}ms for milliseconds or {number}m for minutes"),
            );
            return None;
        }
        Value::Null | Value::Bool(_) | Value::Int(_) | Value::Float(_) | Value::List(_) | Value::Map(_) => {
            None
        }
    };
    match parsed {
        Some(duration) if (least..=most).contains(&duration) => return Some(duration),
        Some(duration) => {
            report.fault(&node.at, format!("{what} is {}, which is out of range", show(duration)), range);
        }
        None => {
            report.fault(
                &node.at,
                format!("{what} must be a duration, found {}", found(node, report)),
                range,
            );
        }
    }
    None
}

/// Bytes: `256Mi`, `1G` or a plain number.
pub(crate) fn memory(node: &Node, what: &str, report: &mut Report<'_>) -> Option<u64> {
    let bytes = match &node.value {
        Value::Int(number) => u64::try_from(*number).ok(),
        Value::Text(text) => parse_memory(text),
        Value::Null | Value::Bool(_) | Value::Float(_) | Value::List(_) | Value::Map(_) => None,
    };
    match bytes {
        Some(bytes) if (MEMORY.0..=MEMORY.1).contains(&bytes) => return Some(bytes),
        Some(bytes) if bytes > 0 && bytes < MEMORY.0 && matches!(node.value, Value::Int(_)) => report.fault(
            &node.at,
            format!("{what} is only {bytes} bytes"),
            format!("did you mean {bytes}Mi? the least is 1Mi"),
        ),
        Some(_) => {
            report.fault(&node.at, format!("{what} is out of range"), "write an amount from 1Mi to 1024Ti");
        }
        None => {
            let near = match &node.value {
                Value::Text(text) => respelled(text),
                _ => None,
            };
            report.fault(
                &node.at,
                format!("{what} must be an amount of memory, found {}", found(node, report)),
                near.map_or_else(
                    || "write a whole number and a unit, such as 256Mi or 1Gi".to_owned(),
                    |near| format!("did you mean {near}? the units are Ki, Mi, Gi, Ti, k, M, G and T"),
                ),
            );
        }
    }
    None
}

fn parse_memory(text: &str) -> Option<u64> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let factor = if unit.is_empty() { 1 } else { UNITS.iter().find(|(name, _)| *name == unit)?.1 };
    number.checked_mul(factor)
}

/// `256MB`, `256 mib` and `256m` to `256Mi`.
fn respelled(text: &str) -> Option<String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let letter = unit.trim_start().chars().next()?.to_ascii_uppercase();
    let rest = unit.trim().get(1..)?.to_ascii_lowercase();
    (digits > 0 && "KMGT".contains(letter) && ["", "b", "i", "ib"].contains(&rest.as_str()))
        .then(|| format!("{number}{letter}i"))
}

/// Thousandths of a CPU: `500m`, `0.5` or `2`.
pub(crate) fn cpu(node: &Node, what: &str, report: &mut Report<'_>) -> Option<u32> {
    let text = match &node.value {
        Value::Int(_) | Value::Float(_) => report.written(&node.at).to_owned(),
        Value::Text(text) => text.clone(),
        Value::Null | Value::Bool(_) | Value::List(_) | Value::Map(_) => String::new(),
    };
    match parse_cpu(&text) {
        Some(millis) if (CPU_MILLIS.0..=CPU_MILLIS.1).contains(&millis) => return Some(millis),
        Some(_) => report.fault(
            &node.at,
            format!("{what} is {}, which is out of range", quoted(&text)),
            "write an amount from 10m (a hundredth of a CPU) to 1000 CPUs",
        ),
        None => report.fault(
            &node.at,
            format!("{what} must be an amount of CPU, found {}", found(node, report)),
            "write thousandths such as 500m, or CPUs such as 2 or 0.5",
        ),
    }
    None
}

/// Saturates, so that what is far too much is out of range and not unreadable.
fn parse_cpu(text: &str) -> Option<u32> {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let saturated = |text: &str| text.parse::<u32>().unwrap_or(u32::MAX);
    if let Some(millis) = text.strip_suffix('m') {
        return digits(millis).then(|| saturated(millis));
    }
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    if !digits(whole) || !digits(fraction) || fraction.trim_end_matches('0').len() > 3 {
        return None;
    }
    let millis = format!("{:0<3}", fraction.trim_end_matches('0'));
    Some(saturated(whole).saturating_mul(1_000).saturating_add(saturated(&millis)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_as_kubernetes_reads_it() {
        for (text, wanted) in [
            ("256Mi", Some(268_435_456)),
            ("1Gi", Some(1 << 30)),
            ("1G", Some(1_000_000_000)),
            ("1048576", Some(1_048_576)),
            ("256MB", None),
            ("Mi", None),
            ("-1Mi", None),
            ("1.5Gi", None),
            ("99999999999Ti", None),
        ] {
            assert_eq!(parse_memory(text), wanted, "{text}");
        }
        for (text, wanted) in
            [("256MB", Some("256Mi")), ("1gib", Some("1Gi")), ("64 m", Some("64Mi")), ("lots", None)]
        {
            assert_eq!(respelled(text).as_deref(), wanted, "{text}");
        }
    }

    #[test]
    fn cpu_is_read_as_kubernetes_reads_it() {
        for (text, wanted) in [
            ("500m", Some(500)),
            ("2", Some(2_000)),
            ("0.5", Some(500)),
            ("1.250", Some(1_250)),
            ("0.0001", None),
            ("50%", None),
            ("", None),
            ("m", None),
            ("99999999999", Some(u32::MAX)),
        ] {
            assert_eq!(parse_cpu(text), wanted, "{text}");
        }
    }
}
