//! Units of a real systemd, held by the condition in their drop-in.

use anyhow::{Result, ensure};

use super::{super::gate::Server, Place, RECORDS, held, v4};
use crate::{
    Machine, first,
    systemd::{Booted, FAR, policy},
    wait_until,
};

/// Instances of these templates are started, one with Pillion and one without.
const TEMPLATES: [&str; 2] = ["web", "bare"];

/// Each start is an instance of a template that has not been started before, from `systemctl start` on.
pub(super) struct Units {
    booted: Booted,
    server: Server,
}

impl Units {
    pub(super) fn new(machine: &Machine) -> Result<Self> {
        let booted = Booted::with_agent()?;
        let server = Server::start(&booted.far, &format!("{FAR}:8080"))?;
        let program = booted.program(&first::build(machine.directory(), "first", v4(server.address)?)?)?;
        for template in TEMPLATES {
            let service = format!("Type=oneshot\nExecStart={}", program.display());
            booted.unit(&format!("{template}@.service"), &service)?;
        }
        let select = format!("units: ['{}@*.service']", TEMPLATES[0]);
        booted.policy("web.yaml", &policy("web", &select, "builtin: relay, stopGrace: 1s", "closed"))?;
        booted.until_drop_ins(&[&format!("{}@.service", TEMPLATES[0])])?;
        Ok(Self { booted, server })
    }
}

impl Place for Units {
    fn server(&self) -> &Server {
        &self.server
    }

    fn start(&self, name: &str, matched: bool) -> Result<()> {
        let [with, without] = TEMPLATES;
        let unit = format!("{}@{name}.service", if matched { with } else { without });
        // Of a oneshot unit: to its end.
        self.booted.start(&[&unit])?;
        self.booted.until_forgotten(&unit)
    }

    fn captured(&self, expected: usize) -> Result<usize> {
        let relayed = || self.booted.records_to(self.server.address).map(|records| records.len());
        // What is missing after that has been missed.
        let _ = wait_until("the relays' records", RECORDS, || relayed().is_ok_and(|count| count >= expected));
        relayed()
    }

    fn held(&self) -> Result<Vec<f64>> {
        let events = self.booted.pillion(&["events", "--output", "json"])?.success()?.stdout;
        let held = held(&events, |event| event["gate"] == "systemd")?;
        // The agent keeps so many of its latest events, and a start has some.
        ensure!(held.len() >= self.captured(0)?, "only {} starts are in the agent's events", held.len());
        Ok(held)
    }

    fn end(self: Box<Self>) -> Result<()> {
        self.booted.end()
    }
}
