//! What an application observes is the same under Pillion as without it, but for what is listed here and, with the reasons,
//! in `docs/differences.md`: one program with many socket behaviours (`tests/differ`), and small clients in several
//! languages, each run twice in the same place.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use pillion_tests::{
    Machine, ProcessGuard,
    differ::{self, Found, Observations, Stage},
    on_machine, programs,
};

/// A Java program that is compiled first, on a busy machine.
const COMPILE_LIMIT: Duration = Duration::from_secs(120);

/// A difference that is there for a reason: its name in `docs/differences.md`; the case, in all its variants unless one is
/// named; which of its observations; what is observed bare and under Pillion, where `*` stands for anything.
struct Listed(&'static str, &'static str, &'static str, &'static str, &'static str);

const LISTED: &[Listed] = &[
    // The companion's backlog has the connection before the destination was tried.
    Listed("failed-connect", "connect.refused", "connect", "ECONNREFUSED", "0"),
    Listed("failed-connect", "connect.refused", "in the end", "ECONNREFUSED", "ECONNRESET"),
    Listed("failed-connect", "connect.refused", "after", "OUT|HUP", "IN|OUT|HUP|RDHUP"),
    Listed("failed-connect", "connect.refused", "nonblocking SO_ERROR", "ECONNREFUSED", "ECONNRESET"),
    Listed("failed-connect", "connect.port-zero", "connect", "ECONNREFUSED", "0"),
    Listed("failed-connect", "connect.port-zero", "in the end", "ECONNREFUSED", "ECONNRESET"),
    Listed("failed-connect", "connect.port-zero", "after", "OUT|HUP", "IN|OUT|HUP|RDHUP"),
    Listed("failed-connect", "connect.port-zero", "nonblocking SO_ERROR", "ECONNREFUSED", "ECONNRESET"),
    Listed("failed-connect", "connect.unreachable", "connect", "EHOSTUNREACH", "0"),
    Listed("failed-connect", "connect.unreachable", "in the end", "EHOSTUNREACH", "ECONNRESET"),
    Listed("failed-connect", "connect.unreachable", "after", "OUT|HUP", "IN|OUT|HUP|RDHUP"),
    Listed("failed-connect", "connect.unreachable", "nonblocking connect", "EHOSTUNREACH", "EINPROGRESS"),
    Listed("failed-connect", "connect.unreachable", "nonblocking then", "OUT|HUP", "IN|OUT|ERR|HUP|RDHUP"),
    Listed("failed-connect", "connect.unreachable", "nonblocking SO_ERROR", "0", "ECONNRESET"),
    Listed("failed-connect", "connect.prohibited", "connect", "EACCES", "0"),
    Listed("failed-connect", "connect.prohibited", "in the end", "EACCES", "ECONNRESET"),
    Listed("failed-connect", "connect.prohibited", "after", "OUT|HUP", "IN|OUT|HUP|RDHUP"),
    Listed("failed-connect", "connect.prohibited", "nonblocking connect", "EACCES", "EINPROGRESS"),
    Listed("failed-connect", "connect.prohibited", "nonblocking then", "OUT|HUP", "IN|OUT|ERR|HUP|RDHUP"),
    Listed("failed-connect", "connect.prohibited", "nonblocking SO_ERROR", "0", "ECONNRESET"),
    Listed("failed-connect", "data.fastopen-refused", "sendto", "ECONNREFUSED", "5"),
    Listed("failed-connect", "data.fastopen-refused", "in the end", "ECONNREFUSED", "ECONNRESET"),
    Listed("slow-connect", "connect.timeout", "connect", "EINPROGRESS", "0"),
    Listed("slow-connect", "connect.timeout", "with TCP_SYNCNT", "ETIMEDOUT", "0"),
    Listed("slow-connect", "connect.timeout", "in the end", "ETIMEDOUT", "EAGAIN"),
    Listed("slow-connect", "connect.backlog-full", "connect", "EINPROGRESS", "0"),
    // The companion's connection has a port of its own.
    Listed(
        "source-port",
        "bound.address-and-port",
        "far",
        "from *:2100*, 5 bytes, *",
        "from *:*, 5 bytes, *",
    ),
    Listed("source-port", "connect.own-address", "the same port", "yes", "no"),
    Listed("source-port", "connect.to-itself", "answer", "\"hello\"", "ECONNRESET"),
    Listed("shared-source-port", "bound.one-port-two-destinations", "second", "0", "EADDRNOTAVAIL"),
    Listed("local-address", "names.other-route", "getsockname", "*78*", "*77*"),
    Listed("link-local", "connect.link-local", "connect", "0", "ECONNREFUSED"),
    Listed("link-local", "connect.link-local", "answer", "\"hello\"", "-"),
    Listed("kernel-tables", "names.proc-net-tcp", "the connection is listed", "yes", "no"),
    Listed("v6only", "bound.v6only", "mapped", "ENETUNREACH", "EADDRNOTAVAIL"),
    // A socket option acts on the way that its own socket goes, which is to the companion.
    Listed("packets", "options.IP_TOS-arrives", "far", "*, tos 16, *", "*, tos 0, *"),
    Listed("packets", "options.SO_MARK-routes", "connect", "EACCES", "0"),
    Listed("packets", "options.path", "TCP_MAXSEG within Ethernet's", "yes", "no"),
    Listed("packets", "options.path", "MTU", "1500", "65535"),
    Listed("device", "options.SO_BINDTODEVICE", "after", "\"far\"", "\"\""),
    Listed("vanished-peer", "end.vanished", "told within 3 s", "ETIMEDOUT", "no"),
    Listed("multipath", "options.multipath-tcp", "socket", "had", "EPROTONOSUPPORT"),
    // connect() with AF_UNSPEC leaves a socket bound to what Pillion bound it to.
    Listed("dissolved", "connect.unspec-then-listen", "connect", "0", "ECONNREFUSED"),
    Listed("dissolved", "connect.unspec-then-bind/v6", "connect", "0", "EINPROGRESS"),
    Listed("dissolved", "connect.unspec-then-bind/v6", "getpeername", "[fd77::2]:7001", "ENOTCONN"),
    Listed("dissolved", "connect.unspec-then-bind/v6", "answer", "\"hello\"", "EAGAIN"),
    // The application is dialled by its companion.
    Listed("inbound-peer", "in.names", "accepted from", "*", "*"),
    Listed("inbound-refused", "in.refused", "caller", "connect: ECONNREFUSED", "\"\", then ECONNRESET"),
    Listed(
        "inbound-refused",
        "in.bound-not-listening",
        "caller",
        "connect: ECONNREFUSED",
        "\"\", then ECONNRESET",
    ),
];

const DOCUMENT: &str = "docs/differences.md";

fn policy(machine: &Machine) -> Result<PathBuf> {
    machine.file(
        "relay.yaml",
        "spec:\n  select: { runtimes: [process] }\n  companions: [{ name: r, builtin: relay }]\n  \
         redirect:\n    outbound: [{ to: \"r:15001\" }]\n    inbound: [{ ports: [8080], to: \"r:15006\" }]\n  \
         onFailure: closed\n",
    )
}

/// How many connections the relay has told of, by direction.
fn relayed(stderr: &str) -> BTreeMap<&'static str, usize> {
    let count = |direction: &'static str| {
        let field = format!("\"direction\":\"{direction}\"");
        (
            direction,
            stderr.lines().filter(|line| line.starts_with("{\"ts\"") && line.contains(&field)).count(),
        )
    };
    ["outbound", "inbound"].map(count).into()
}

impl Listed {
    fn is_of(&self, case: &str) -> bool {
        case == self.1 || case.split_once('/').is_some_and(|(name, _)| name == self.1)
    }

    fn is(&self, found: &Found) -> bool {
        self.is_of(&found.case)
            && self.2 == found.observation
            && differ::fits(self.3, &found.bare)
            && differ::fits(self.4, &found.under)
    }
}

/// What is found and not listed, and what is listed and not found in each variant of its case.
fn faults(found: &[Found], cases: &Observations) -> Vec<String> {
    let unlisted = found.iter().filter(|found| !LISTED.iter().any(|listed| listed.is(found)));
    let mut faults: Vec<String> = unlisted.map(|found| format!("not listed: {found:?}")).collect();
    for listed in LISTED {
        let variants: Vec<_> = cases.keys().filter(|case| listed.is_of(case)).collect();
        if variants.is_empty() {
            faults.push(format!("there is no case {}", listed.1));
        }
        for case in variants {
            if !found.iter().any(|found| found.case == *case && listed.is(found)) {
                faults
                    .push(format!("listed, and not so: {case}: {}: {} and {}", listed.2, listed.3, listed.4));
            }
        }
    }
    faults
}

#[test]
fn an_application_observes_the_same_but_for_what_is_listed() -> Result<()> {
    on_machine(|machine| {
        let program = differ::build(machine.directory())?;
        let mut command = Command::new(&program);
        command.arg("run");
        // Each in namespaces of its own: what one leaves (cookies of TCP Fast Open, ports in use) is nothing to the other.
        let bare = Stage::new(&program)?.bare(&mut command)?;
        let under = Stage::new(&program)?.under(&policy(machine)?, &command)?;
        let relayed = relayed(&under.stderr);
        ensure!(relayed["outbound"] > 8_000 && relayed["inbound"] > 50, "redirected: {relayed:?}");
        let (bare, under) = (differ::observations(&bare.stdout)?, differ::observations(&under.stdout)?);
        let faults = faults(&differ::differences(&bare, &under), &bare);
        ensure!(faults.is_empty(), "{}", faults.join("\n"));
        Ok(())
    })
}

#[test]
fn the_document_names_the_same_differences() -> Result<()> {
    let path = programs::checkout().join(DOCUMENT);
    let text = fs::read_to_string(&path).with_context(|| format!("no {}", path.display()))?;
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    let told: Vec<&str> = rows.map(|(name, _)| name).collect();
    let names: BTreeSet<&str> = told.iter().copied().collect();
    assert_eq!(names.len(), told.len(), "a difference is told twice: {told:?}");
    assert_eq!(names, LISTED.iter().map(|listed| listed.0).collect());
    Ok(())
}

/// A client in some language: how it is built, and then started.
fn client(language: &str, machine: &Machine, differ: &Path) -> Result<Command> {
    let source = |name: &str| differ::source("clients").join(name);
    let built = |command: &mut Command| {
        let built = ProcessGuard::finish("a compiler", command, COMPILE_LIMIT)?.success();
        built.with_context(|| format!("the client in {language} cannot be built"))
    };
    let directory = machine.directory();
    let mut command;
    match language {
        "C" => {
            command = Command::new(differ);
            command.arg("client");
        }
        "Python" => {
            command = Command::new(programs::system("python3")?);
            command.arg(source("client.py"));
        }
        "JavaScript" => {
            command = Command::new(programs::system("node")?);
            command.arg(source("client.js"));
        }
        "Go" => {
            let program = directory.join("client-in-go");
            let mut go = Command::new(programs::system("go")?);
            go.env("GOCACHE", directory.join("go-cache")).env("GO111MODULE", "off");
            built(go.args(["build", "-o"]).arg(&program).arg(source("client.go")))?;
            command = Command::new(program);
        }
        "Java" => {
            let classes = directory.join("classes");
            let mut javac = Command::new(programs::system("javac")?);
            built(javac.arg("-d").arg(&classes).arg(source("Client.java")))?;
            command = Command::new(programs::system("java")?);
            command.arg("-cp").arg(classes).arg("Client");
        }
        other => anyhow::bail!("no client in {other}"),
    }
    command.args(["far.test", "far6.test", "both.test"]);
    Ok(command)
}

#[test]
fn clients_in_five_languages_observe_the_same() -> Result<()> {
    on_machine(|machine| {
        let program = differ::build(machine.directory())?;
        let names = "127.0.0.1 localhost\n::1 localhost\n10.77.0.2 far.test\nfd77::2 far6.test\n\
                     10.77.0.2 both.test\nfd77::2 both.test\n";
        let hosts = machine.file("hosts", names)?;
        // Nobody is there: what is not in the file is not known, at once.
        let resolver = machine.file("resolv.conf", "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")?;
        let policy = policy(machine)?;
        let stage = Stage::new(&program)?;
        for language in ["C", "Python", "JavaScript", "Go", "Java"] {
            let client = client(language, machine, &program)?;
            // With names of its own.
            let mut command = Command::new(programs::system("unshare")?);
            let script = "mount --bind \"$0\" /etc/hosts && mount --bind \"$1\" /etc/resolv.conf && \
                          shift && exec \"$@\"";
            command.args(["--mount", "sh", "-c", script]).arg(&hosts).arg(&resolver);
            command.arg(client.get_program()).args(client.get_args());
            let bare = stage.bare(&mut command).with_context(|| format!("{language}, bare"))?;
            let under =
                stage.under(&policy, &command).with_context(|| format!("{language}, under Pillion"))?;
            for wanted in ["you asked for /once", "kept: you asked for /kept/4", "many: 100"] {
                ensure!(bare.stdout.contains(wanted), "{language} does not say {wanted}: {}", bare.stdout);
            }
            assert_eq!(under.stdout, bare.stdout, "{language}");
            let relayed = relayed(&under.stderr);
            // Java keeps connections for further requests, the others make one for each of a hundred.
            ensure!(relayed["outbound"] >= 20, "{language}: redirected: {relayed:?}");
        }
        Ok(())
    })
}
