//! Connections that were open before redirection came into force, on real sockets: kept, or reset as the policy says, and then
//! exactly those that would have gone to a companion.

use std::{fs, net::SocketAddr, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use pillion_tests::{
    EchoServer, Machine, Puppet, cgroup, on_machine, programs,
    puppet::Socket,
    scene::{FAR, KIND, NEAR, Scene, connected, id, still_answers},
    wait_for,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(30);
const EXCLUDED: u16 = 2222;

/// Containers with the label `app=web` get a relay for both directions.
fn policy(existing: &str, on_failure: &str) -> String {
    format!(
        "{KIND}\nmetadata: {{ name: web }}\nspec:\n  \
         select: {{ runtimes: [containerd], labels: {{ app: web }} }}\n  \
         companions: [{{ name: relay, builtin: relay, stopGrace: 2s }}]\n  \
         redirect:\n    outbound: [{{ to: relay, exclude: {{ ports: [{EXCLUDED}] }} }}]\n    \
         inbound: [{{ ports: [7000], to: relay }}]\n  \
         onFailure: {on_failure}\n  existingConnections: {existing}\n"
    )
}

/// One end, with the other if it is a puppet's too.
struct Open {
    name: &'static str,
    end: End,
    /// Whether the rules would have taken it.
    concerned: bool,
}

/// Who has the end that is spoken through.
enum End {
    App(Socket),
    Nested(Socket),
    Neighbour(Socket),
    Remote(Socket),
}

/// A container with connections of every kind, a process in a cgroup below its own, and a neighbour in its namespace.
struct Town {
    scene: Scene,
    app: Puppet,
    nested: Puppet,
    neighbour: Puppet,
    remote: Puppet,
    open: Vec<Open>,
    _excluded: EchoServer,
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

impl Town {
    fn new(machine: &Machine) -> Result<Self> {
        let scene = Scene::new(machine)?;
        let excluded = EchoServer::start(&scene.far, &format!("{FAR}:{EXCLUDED}"))?;
        let mut app = scene.puppet("app", &[("app", "web")])?;
        let mut nested = below(&scene, "app")?;
        let mut neighbour = scene.puppet("neighbour", &[])?;
        let mut remote = scene.far.run(|| Puppet::under(&mut Command::new(programs::puppet()?)))?;
        let to = scene.echo.address();
        let mut open = vec![
            Open { name: "out", end: End::App(connected(&mut app, to)?), concerned: true },
            Open {
                name: "out, from a nested cgroup",
                end: End::Nested(connected(&mut nested, to)?),
                concerned: true,
            },
            Open {
                name: "excluded",
                end: End::App(connected(&mut app, excluded.address())?),
                concerned: false,
            },
            Open {
                name: "the neighbour's",
                end: End::Neighbour(connected(&mut neighbour, to)?),
                concerned: false,
            },
        ];
        // Loopback, and arriving: at a port with a rule, at one without, and at the neighbour's with a rule's number.
        let local = app.echo(address("127.0.0.1:0"))??;
        open.push(Open { name: "loopback", end: End::App(connected(&mut app, local)?), concerned: false });
        for (name, port, concerned) in [("in", 7000, true), ("in, without a rule", 7001, false)] {
            app.echo(address(&format!("{NEAR}:{port}")))??;
            let end = End::Remote(connected(&mut remote, address(&format!("{NEAR}:{port}")))?);
            open.push(Open { name, end, concerned });
        }
        let mut town = Self { scene, app, nested, neighbour, remote, open, _excluded: excluded };
        town.expect(|_| true)?;
        Ok(town)
    }

    /// Speaks through every connection: those that `lives` names answer, the others have been reset.
    fn expect(&mut self, lives: impl Fn(&Open) -> bool) -> Result<()> {
        for open in &self.open {
            let (puppet, socket) = match open.end {
                End::App(socket) => (&mut self.app, socket),
                End::Nested(socket) => (&mut self.nested, socket),
                End::Neighbour(socket) => (&mut self.neighbour, socket),
                End::Remote(socket) => (&mut self.remote, socket),
            };
            if lives(open) {
                still_answers(puppet, socket, open.name).with_context(|| open.name)?;
                continue;
            }
            let sent = puppet.send(socket, "anybody there?")?;
            let heard = match sent {
                Ok(()) => puppet.receive(socket)?.map(drop),
                Err(errno) => Err(errno),
            };
            let reset = matches!(heard, Err(Errno::ECONNABORTED | Errno::ECONNRESET | Errno::EPIPE));
            ensure!(reset, "{}: {heard:?} instead of a reset", open.name);
        }
        Ok(())
    }

    /// The events of this kind that the container has.
    fn events(&self, kind: &str) -> Result<Vec<Value>> {
        let detail = self.scene.agent.workload(&id("app"))?.context("the workload is known")?;
        let events = detail["events"].as_array().context("events")?;
        Ok(events.iter().filter(|event| event["kind"] == kind).cloned().collect())
    }

    fn until_reset(&self, count: usize) -> Result<()> {
        let events = wait_for("a reset", SOON, || {
            self.events("connectionsReset").ok().filter(|events| !events.is_empty())
        })?;
        ensure!(events.len() == 1, "{events:?}");
        let message = events[0]["message"].as_str().unwrap_or_default();
        ensure!(message.starts_with(&format!("{count} open connection")), "{message}");
        Ok(())
    }

    fn new_ones_are_redirected(&mut self) -> Result<()> {
        self.scene.says_through_relay(&mut self.app)?;
        self.scene.says_through_relay(&mut self.nested)?;
        self.scene.says_directly(&mut self.neighbour)
    }

    fn end(self) -> Result<()> {
        let Self { scene, app, nested, neighbour, remote, .. } = self;
        drop((app, nested, neighbour, remote));
        scene.end()
    }
}

/// A process in a new cgroup below a container's, and in its network namespace.
fn below(scene: &Scene, name: &str) -> Result<Puppet> {
    let pid = scene.containerd.pid(name)?;
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::/")).context("a cgroup2 path")?;
    let nested = cgroup::cgroup2_mount()?.join(path).join("nested");
    fs::create_dir(&nested)?;
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "echo $$ >$0/cgroup.procs && exec $1"]).arg(nested).arg(programs::puppet()?);
    scene.near.run(|| Puppet::under(&mut command))
}

#[test]
fn open_connections_are_kept_unless_the_policy_says_otherwise() -> Result<()> {
    on_machine(|machine| {
        let mut town = Town::new(machine)?;
        town.scene.agent.policy("web.yaml", &policy("keep", "closed"))?;
        town.scene.agent.run()?;
        town.scene.agent.until_verdict(&id("app"), "attached")?;
        town.expect(|_| true)?;
        town.new_ones_are_redirected()?;
        town.expect(|_| true)?;
        ensure!(town.events("connectionsReset")?.is_empty());
        town.end()
    })
}

/// Failing open, the reset waits for the companion; failing closed it does not.
fn reset_at_the_attach(on_failure: &str) -> Result<()> {
    on_machine(|machine| {
        let mut town = Town::new(machine)?;
        town.scene.agent.policy("web.yaml", &policy("reset", on_failure))?;
        town.scene.agent.run()?;
        let attached = town.scene.agent.until_verdict(&id("app"), "attached")?;
        assert_eq!(attached["firstInstruction"], "after");
        town.until_reset(3)?;
        town.expect(|open| !open.concerned)?;
        town.new_ones_are_redirected()?;
        town.end()
    })
}

#[test]
fn a_reset_at_the_attach_breaks_exactly_what_the_companion_would_have_had_open() -> Result<()> {
    reset_at_the_attach("open")
}

#[test]
fn a_reset_at_the_attach_breaks_exactly_what_the_companion_would_have_had_closed() -> Result<()> {
    reset_at_the_attach("closed")
}

#[test]
fn a_policy_that_comes_to_reset_spares_what_goes_through_the_relay_already() -> Result<()> {
    on_machine(|machine| {
        let mut town = Town::new(machine)?;
        let to = town.scene.echo.address();
        town.scene.agent.policy("web.yaml", &policy("keep", "open"))?;
        town.scene.agent.run()?;
        town.scene.agent.until_verdict(&id("app"), "attached")?;
        let redirected = town.scene.redirected()?;
        let through = connected(&mut town.app, to)?;
        ensure!(town.scene.redirected()? == redirected + 1, "a connection that was not redirected");
        let arriving = connected(&mut town.remote, address(&format!("{NEAR}:7000")))?;
        still_answers(&mut town.app, through, "through the relay")?;
        still_answers(&mut town.remote, arriving, "through the relay")?;
        town.expect(|_| true)?;
        town.scene.agent.policy("web.yaml", &policy("reset", "open"))?;
        town.until_reset(3)?;
        town.expect(|open| !open.concerned)?;
        still_answers(&mut town.app, through, "still through the relay")?;
        still_answers(&mut town.remote, arriving, "still through the relay")?;
        town.new_ones_are_redirected()?;
        town.end()
    })
}
