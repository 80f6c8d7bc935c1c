//! An explained connection in words. Pure.

use std::fmt::Write as _;

use pillion_workload::FailureMode;

use crate::{
    connection::{ConnectionInfo, StepOutcome},
    render::{Paint, Tone, plain},
};

/// The steps, what becomes of it, and what the kernel says.
pub(crate) fn in_words(info: &ConnectionInfo, paint: Paint) -> String {
    let mut out = String::new();
    for (number, step) in info.steps.iter().enumerate() {
        let (tone, mark) = match step.outcome {
            StepOutcome::NotMatched => (Tone::Dim, "no"),
            StepOutcome::Decides => (Tone::Strong, "yes"),
            StepOutcome::Unknown => (Tone::Warn, "?"),
        };
        let line = format!("{:<3}  {:<20}  {}", mark, step.field, plain(&step.why));
        let _ = writeln!(out, "{}. {}", number + 1, paint.tone(tone, &line));
    }
    let Some(companion) = &info.companion else {
        let _ = writeln!(out, "It passes: {} as the application says.", info.original);
        kernel(info, paint, &mut out);
        return out;
    };
    let port = info.companion_port.map_or_else(|| " (port allocated)".to_owned(), |port| format!(":{port}"));
    // A resolver need not know who was asked, and is not told.
    let by_dns = info.steps.last().is_some_and(|step| step.field == "dns");
    let does = if by_dns { "answers instead of" } else { "is told" };
    let _ = writeln!(out, "It goes to companion {}{port}, which {does} {}.", plain(companion), info.original);
    match (info.listening, info.on_failure, info.effective) {
        (Some(false), Some(FailureMode::Open), _) => {
            let text = "The companion does not listen there now: it passes to where the application says (onFailure: open).";
            let _ = writeln!(out, "{}", paint.tone(Tone::Warn, text));
        }
        (Some(false), _, _) => {
            let text =
                "The companion does not listen there now: it is refused, ECONNREFUSED (onFailure: closed).";
            let _ = writeln!(out, "{}", paint.tone(Tone::Bad, text));
        }
        (listening, mode, effective) => {
            if let Some(effective) = effective {
                let _ = writeln!(out, "Its socket connects to {effective}.");
            }
            if listening == Some(true) {
                out.push_str("The companion listens there now.\n");
            }
            out.push_str(match mode {
                Some(FailureMode::Open) => {
                    "While the companion does not listen, it passes (onFailure: open).\n"
                }
                Some(FailureMode::Closed) => {
                    "While the companion does not listen, it is refused (onFailure: closed).\n"
                }
                None => "",
            });
        }
    }
    kernel(info, paint, &mut out);
    out
}

fn kernel(info: &ConnectionInfo, paint: Paint, out: &mut String) {
    let Some(kernel) = &info.kernel else { return };
    let class = kernel.class.map_or_else(String::new, |class| format!(", class {class}"));
    let to = kernel.companion_port.map_or_else(String::new, |port| format!(" → port {port}"));
    let says = format!("{}{to} (table {}{class})", kernel.rule, kernel.table);
    if kernel.agrees {
        let _ = writeln!(out, "The kernel's tables say the same: {says}.");
    } else {
        let text = format!(
            "THE KERNEL'S TABLES SAY OTHERWISE: {says}. That is a fault of Pillion: save a policy anew to have them written \
             again, and report it."
        );
        let _ = writeln!(out, "{}", paint.tone(Tone::Bad, &text));
    }
}

#[cfg(test)]
mod tests {
    use pillion_redirect::{Rule, TableAnswer};
    use pillion_workload::{OutboundRule, RedirectSpec, Target};

    use super::*;
    use crate::connection::{Sender, explain};

    fn words(port: u16, rule: Rule, listens: [bool; 2], mode: FailureMode) -> String {
        let to = Target { companion: "envoy".parse().unwrap(), port: Some(15001) };
        let mut all = OutboundRule::all_tcp(to);
        all.cidrs = vec!["10.0.0.0/8".parse().unwrap()];
        let spec = RedirectSpec { outbound: vec![all], ..RedirectSpec::default() };
        let answer = TableAnswer { table: 6, class: Some(1), rule, companion_port: Some(port), listens };
        let connection = "tcp:10.1.2.3:443".parse().unwrap();
        in_words(&explain(&spec, mode, connection, &Sender::default(), Some(answer)), Paint::OFF)
    }

    #[test]
    fn a_connection_is_told_to_its_end() {
        assert_eq!(
            words(15001, Rule::Outbound(0), [true, false], FailureMode::Closed),
            "1. yes  outbound[0]           rule 1 matches\n\
             It goes to companion envoy:15001, which is told 10.1.2.3:443.\n\
             Its socket connects to 127.0.0.1:15001.\n\
             The companion listens there now.\n\
             While the companion does not listen, it is refused (onFailure: closed).\n\
             The kernel's tables say the same: rule 1 → port 15001 (table 6, class 1).\n"
        );
    }

    #[test]
    fn a_companion_that_is_gone_and_tables_that_differ_are_loud() {
        let gone = words(15001, Rule::Outbound(0), [false, false], FailureMode::Closed);
        assert!(gone.contains("it is refused, ECONNREFUSED"), "{gone}");
        let open = words(15001, Rule::Outbound(0), [false, false], FailureMode::Open);
        assert!(open.contains("it passes to where the application says"), "{open}");
        let wrong = words(15002, Rule::Outbound(1), [true, true], FailureMode::Open);
        assert!(wrong.contains("SAY OTHERWISE: rule 2 → port 15002"), "{wrong}");
    }
}
