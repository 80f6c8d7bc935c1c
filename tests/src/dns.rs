//! A workload whose resolvers are answered by a companion, dnsmasq, configured by the example in `packaging/companions/dnsmasq`;
//! a far host with a resolver that knows other things; and the clients that ask (`tests/dns`).

use std::{
    collections::BTreeSet,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{Finished, Machine, NetNs, PillionRun, ProcessGuard, cgroup, programs, run, wait_until};

const SOON: Duration = Duration::from_secs(20);
/// Longer than a client takes, also on a busy machine; much shorter than a resolver that is not there is waited for often.
const CLIENT_LIMIT: Duration = Duration::from_secs(60);
/// A Java program that is compiled first, on a busy machine.
const COMPILE_LIMIT: Duration = Duration::from_secs(120);
const PROGRAM: &str = "/usr/sbin/dnsmasq";
const NAMES: &str = "/etc/pillion/dnsmasq.d";

/// Resolvers that are not there: addresses of the workload's network that nobody has.
pub const ABSENT: [&str; 2] = ["10.77.0.53", "fd77::53"];
/// The resolver of the far host, which is there.
pub const FAR: &str = "10.77.0.2";
/// What only the companion knows; the far resolver says something else.
pub const ONLY: &str = "only.test";
/// Addresses of [`ONLY`] as the companion says.
pub const ONLY_IS: [&str; 2] = ["10.77.0.80", "fd77::80"];
/// The address of [`ONLY`] as the far resolver says.
pub const FAR_SAYS: &str = "10.66.66.66";
/// What only the far resolver knows, which the companion asks.
pub const FORWARDED: &str = "forwarded.test";
/// Its address.
pub const FORWARDED_IS: &str = "10.99.0.1";
/// A name with so many bytes of text that they are more than a datagram without EDNS holds.
pub const MEDIUM: (&str, usize) = ("medium.test", 600);
/// More than dnsmasq sends as a datagram at all.
pub const LONG: (&str, usize) = ("long.test", 2400);

/// The two hosts, and files for companion and clients.
#[derive(Debug)]
pub struct Stage<'a> {
    /// The workload's: `10.77.0.1` and `fd77::1`.
    pub near: NetNs,
    machine: &'a Machine,
    policy: PathBuf,
    // Ends before its namespace does.
    _resolver: ProcessGuard,
    _far: NetNs,
}

impl<'a> Stage<'a> {
    /// Makes both; the far resolver answers.
    pub fn new(machine: &'a Machine) -> Result<Self> {
        let (near, far) = NetNs::pair()?;
        let program = programs::system("dnsmasq")?;
        let policy = run::example(machine, "dnsmasq", "dnsmasq.conf", (PROGRAM, &program))?;
        let names = machine.directory().join("names");
        fs::create_dir(&names)?;
        let template = fs::read_to_string(machine.directory().join("dnsmasq.conf"))?;
        ensure!(template.matches(NAMES).count() == 1, "{NAMES} is not once in the template");
        machine.file("dnsmasq.conf", &template.replace(NAMES, &names.display().to_string()))?;
        let record = format!("\"{}\"", ["a".repeat(200), "b".repeat(200), "c".repeat(200)].join("\",\""));
        let mut records = format!(
            "host-record={ONLY},{}\nserver={FAR}\ntxt-record={},{record}\n",
            ONLY_IS.join(","),
            MEDIUM.0
        );
        for number in 0..4 {
            // Of equal records only one is answered.
            let record = record.replacen("aa", &format!("{number}a"), 1);
            records.extend(["txt-record=", LONG.0, ",", &record, "\n"]);
        }
        machine.file("names/names.conf", &records)?;
        let mut resolver = Command::new(&program);
        resolver.args(["--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--pid-file="]);
        resolver.args(["--log-facility=-", "--no-hosts", "--no-resolv", "--bind-interfaces"]);
        resolver.arg(format!("--listen-address={FAR}"));
        for (name, address) in [(ONLY, FAR_SAYS), (FORWARDED, FORWARDED_IS)] {
            resolver.arg(format!("--host-record={name},{address}"));
        }
        let mut resolver = ProcessGuard::spawn_in(&far, "the far resolver", &mut resolver)?;
        resolver.stderr_line(SOON, |line| line.contains("started"))?;
        Ok(Self { near, machine, policy, _resolver: resolver, _far: far })
    }

    /// A run with the example's policy, of which `changes` are replaced.
    pub fn run(&self, changes: &[(&str, &str)]) -> Result<PillionRun> {
        let mut policy = fs::read_to_string(&self.policy)?;
        for (from, to) in changes {
            ensure!(policy.matches(from).count() == 1, "{from} is not once in the policy");
            policy = policy.replace(from, to);
        }
        let policy = self.machine.file("changed.yaml", &policy)?;
        PillionRun::start_with(&self.near, &policy, &["--label", "app=api"], &[])
    }

    /// Kills the companion, which cannot start again before [`Stage::let_companion_start`].
    pub fn end_companion(&self, run: &PillionRun) -> Result<()> {
        let [names, away] = self.names();
        fs::rename(names, away)?;
        let pid = run.companion("dnsmasq")?;
        kill(Pid::from_raw(pid.try_into()?), Signal::SIGKILL)?;
        // What is asked before its sockets are closed is lost with it.
        wait_until("the end of dnsmasq", SOON, || !Path::new(&format!("/proc/{pid}")).exists())
    }

    /// The files without which it does not start are there again.
    pub fn let_companion_start(&self) -> Result<()> {
        let [names, away] = self.names();
        Ok(fs::rename(away, names)?)
    }

    fn names(&self) -> [PathBuf; 2] {
        ["names", "names-away"].map(|name| self.machine.directory().join(name))
    }

    /// Runs a client within the workload, with these resolvers in its `resolv.conf`.
    pub fn client(&self, run: &PillionRun, resolvers: &[&str], client: &Command) -> Result<Finished> {
        let lines: String = resolvers.iter().flat_map(|address| ["nameserver ", address, "\n"]).collect();
        let resolvers = self.machine.file("resolv.conf", &lines)?;
        let order = self.machine.file("nsswitch.conf", "hosts: files dns\n")?;
        let script = "mount --bind \"$0\" /etc/resolv.conf && mount --bind \"$1\" /etc/nsswitch.conf && \
                      shift && exec \"$@\"";
        let mut command = cgroup::command_in(&run.cgroup("workload")?, "unshare");
        command.args(["--mount", "sh", "-c", script]).arg(resolvers).arg(order);
        command.arg(client.get_program()).args(client.get_args());
        self.near.run(|| ProcessGuard::finish("a client", &mut command, CLIENT_LIMIT))
    }

    /// A program that asks for [`ONLY`] and, where its language's own resolver can, for the text of [`LONG`].
    pub fn asking(&self, which: &str) -> Result<Command> {
        let source = |name: &str| programs::checkout().join("tests/dns").join(name);
        let built = |command: &mut Command| {
            let built = ProcessGuard::finish("a compiler", command, COMPILE_LIMIT)?.success();
            built.with_context(|| format!("the client {which} cannot be built"))
        };
        let directory = self.machine.directory();
        let in_c = |compiler: &str| -> Result<Command> {
            let program = directory.join(format!("resolve-{compiler}"));
            built(
                Command::new(programs::system(compiler)?).arg("-o").arg(&program).arg(source("resolve.c")),
            )?;
            Ok(Command::new(program))
        };
        let interpreted = |program: &str, name: &str| -> Result<Command> {
            let mut command = Command::new(programs::system(program)?);
            command.arg(source(name));
            Ok(command)
        };
        let mut command = match which {
            "getent" => {
                let mut command = Command::new(programs::system("getent")?);
                command.arg("ahosts");
                command
            }
            "glibc" => in_c("cc")?,
            "musl" => in_c("musl-gcc")?,
            "Python" => interpreted("python3", "resolve.py")?,
            "Node" => interpreted("node", "resolve.js")?,
            "Go" => {
                let program = directory.join("resolve-go");
                let mut go = Command::new(programs::system("go")?);
                go.env("GOCACHE", directory.join("go-cache")).env("GO111MODULE", "off");
                built(go.args(["build", "-o"]).arg(&program).arg(source("resolve.go")))?;
                Command::new(program)
            }
            "Java" => {
                let classes = directory.join("classes");
                let mut javac = Command::new(programs::system("javac")?);
                built(javac.arg("-d").arg(&classes).arg(source("Resolve.java")))?;
                let mut command = Command::new(programs::system("java")?);
                command.arg("-cp").arg(classes).arg("Resolve");
                command
            }
            other => bail!("no client {other}"),
        };
        command.arg(ONLY);
        if matches!(which, "Node" | "Go" | "Java") {
            command.arg(LONG.0);
        }
        Ok(command)
    }

    /// So many questions from so many sockets, to the resolvers.
    pub fn flood(&self, sockets: u32, questions: u32, resolvers: &[&str]) -> Result<Command> {
        let mut command = Command::new(programs::system("python3")?);
        command.arg(Path::new(&programs::checkout()).join("tests/dns/flood.py"));
        command.args([sockets.to_string(), questions.to_string(), ONLY.to_owned()]).args(resolvers);
        Ok(command)
    }
}

/// All addresses in what a client has printed, but for dig's comments.
pub fn addresses(printed: &str) -> BTreeSet<IpAddr> {
    let lines = printed.lines().filter(|line| !line.starts_with(';'));
    lines.flat_map(str::split_whitespace).filter_map(|word| word.parse().ok()).collect()
}

/// Those that a test expects.
pub fn expected(addresses: &[&str]) -> BTreeSet<IpAddr> {
    addresses.iter().map(|text| text.parse().expect("an address")).collect()
}

/// A question for an IPv4 address as DNS has it on the wire, with two characters as its id. All of it is ASCII.
pub fn question(id: &str, name: &str) -> String {
    let labels: String =
        name.split('.').flat_map(|label| std::iter::once(length(label)).chain(label.chars())).collect();
    format!("{id}\x01\0\0\x01\0\0\0\0\0\0{labels}\0\0\x01\0\x01")
}

fn length(label: &str) -> char {
    u8::try_from(label.len()).ok().filter(u8::is_ascii).map(char::from).expect("at most 63 bytes")
}
