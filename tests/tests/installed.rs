//! containerd 1.6 with what `pillion install-hooks` gives it, in both ways: the first instruction of a pod's containers is captured, and
//! `uninstall-hooks` leaves containerd as it was.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use pillion_tests::{
    Agent, EchoServer, Finished, Lab, Machine, Pod, PodSpec, Pods, on_machine,
    pods::GATEWAY,
    programs,
    scene::{KIND, source_is},
    wait_until,
};

const SOON: Duration = Duration::from_secs(30);
/// Where the wrapper is linked, within the lab.
const LINKS: &str = "/usr/local/sbin";

/// A containerd, a running agent, and a listener that every pod reaches.
struct Stage {
    // In this order they are dropped.
    agent: Agent,
    echo: EchoServer,
    pods: Pods,
    lab: Lab,
    /// containerd's settings.
    config: PathBuf,
}

impl Stage {
    fn new(machine: &Machine) -> Result<Self> {
        let lab = Lab::up("containerd", Some("bookworm"), &[])?;
        let pods = Pods::of(&lab)?;
        let echo = EchoServer::start(&pods.netns()?, "0.0.0.0:8080")?;
        let mut agent = Agent::beside(machine, lab.value("CONTAINERD_ADDRESS")?, "none")?;
        let policy = format!(
            "{KIND}\nmetadata: {{ name: web }}\nspec:\n  select: {{ runtimes: [containerd], labels: {{ app: web }} }}\n  \
             companions: [{{ name: r, builtin: relay, stopGrace: 1s }}]\n  redirect: {{ outbound: [{{ to: r }}] }}\n  \
             onFailure: closed\n"
        );
        agent.policy("web.yaml", &policy)?;
        agent.run()?;
        agent.until_status("containerd", source_is("up"))?;
        let directory = Path::new(lab.value("CNI_CONF_DIR")?).parent().context("a directory of its own")?;
        let config = directory.join("containerd.toml");
        Ok(Self { agent, echo, pods, lab, config })
    }

    /// `pillion ARGUMENTS`, where containerd is.
    fn pillion(&self, arguments: &[&str]) -> Result<Finished> {
        let program = programs::pillion()?.display().to_string();
        self.lab.run(&[&["exec", &program], arguments].concat())
    }

    fn install(&self, more: &[&str]) -> Result<String> {
        let shown = |path: PathBuf| path.display().to_string();
        let (hook, config) = (shown(programs::hook()?), shown(self.config.clone()));
        let (run, state) = (shown(self.agent.run_dir()), shown(self.agent.state_dir()));
        let mut arguments =
            vec!["install-hooks", "--runtime", "containerd", "--config", &config, "--hook", &hook];
        arguments.extend(["--run-dir", &run, "--state-dir", &state]);
        // Elsewhere than the hook, which is in a directory of the build's.
        if !more.contains(&"hook") {
            arguments.extend(["--link-dir", LINKS]);
        }
        Ok(self.pillion(&[&arguments[..], more].concat())?.success()?.stdout)
    }

    /// containerd reads its settings.
    fn restart(&self) -> Result<()> {
        self.pods.restart()?;
        self.agent.until_status("containerd", source_is("up")).map(drop)
    }

    /// A pod whose container's first instruction connects, to its end.
    fn connect(&self, name: &str) -> Result<Pod<'_>> {
        let labels = [("app", "web")];
        let pod = self.pods.run(&PodSpec { name, labels: &labels, ..PodSpec::default() })?;
        let before = self.echo.peers().len();
        let container = pod.run("app", &["/bin/nc", GATEWAY, "8080", "-w5"])?;
        assert_eq!(pod.exit_code(&container)?, 0, "{name}");
        wait_until("its connection", SOON, || self.echo.peers().len() == before + 1)?;
        Ok(pod)
    }

    /// How many connections of a workload its relay has seen.
    fn recorded(&self, workload: &str) -> Result<usize> {
        let records = self.agent.records()?;
        Ok(records.iter().filter(|record| record["workload"] == workload).count())
    }

    /// The same pod, of which the first connection has to be captured by this gate.
    fn captures(&self, name: &str, gate: &str) -> Result<()> {
        let pod = self.connect(name)?;
        let id = pod.id();
        let recorded = wait_until("its record", SOON, || self.recorded(&id).is_ok_and(|count| count == 1));
        let known = self.agent.workload(&id)?.context("the pod is a workload")?;
        recorded.with_context(|| known.to_string())?;
        assert_eq!(
            (&known["verdict"], &known["firstInstruction"]),
            (&"attached".into(), &"before".into()),
            "{known}"
        );
        assert_eq!(known["gate"], gate, "{known}");
        pod.delete()?;
        self.agent.until_forgotten(&id)
    }

    fn end(self) -> Result<()> {
        let Self { agent, echo, pods, lab, .. } = self;
        agent.end()?;
        drop((echo, pods));
        lab.down()
    }
}

#[test]
fn pods_of_containerd_1_6_are_held_in_both_ways_and_it_is_left_as_it_was() -> Result<()> {
    on_machine(|machine| {
        let stage = Stage::new(machine)?;
        let before = fs::read(&stage.config)?;
        for by in ["wrapper", "hook"] {
            let shown = stage.install(&["--default", "--by", by])?;
            ensure!(shown.contains("\n+"), "{shown}");
            assert_eq!(stage.install(&["--default", "--by", by])?, "", "a second time");
            stage.restart()?;
            stage.captures(&format!("by-{by}"), by)?;
            let found = stage.pillion(&["check"])?.stdout;
            ensure!(found.contains("hooks of containerd") && found.contains("every container"), "{found}");
            if by == "wrapper" {
                // The way of who has no classes of CRI.
                let run = ["ctr", "run", "--rm", "--snapshotter", "native", "--label", "app=web"];
                let rest = ["localhost/busybox:1", "by-ctr", "/bin/true"];
                stage
                    .lab
                    .run(&[&run[..], &["--runc-binary", "/usr/local/sbin/pillion-runc"], &rest].concat())?
                    .success()?;
                let events = stage.agent.cli(&["events", "-o", "json"])?.success()?.stdout;
                let admitted = |line: &str| line.contains("default/by-ctr") && line.contains("\"admitted\"");
                ensure!(events.lines().any(admitted), "{events}");
            }
            if by == "hook" {
                // From one way to the other and back: nothing of the first stays.
                stage.install(&["--default", "--by", "wrapper"])?;
                let spec = stage.lab.run(&["exec", "test", "-e", "/etc/pillion/pillion-base-spec.json"])?;
                ensure!(!spec.status.success(), "the specification stays");
                stage.install(&["--default", "--by", "hook"])?;
                let wrapper = stage.lab.run(&["exec", "test", "-e", "/usr/local/sbin/pillion-runc"])?;
                ensure!(!wrapper.status.success(), "the wrapper stays");
            }
            stage.pillion(&["uninstall-hooks", "--runtime", "containerd"])?.success()?;
            ensure!(fs::read(&stage.config)? == before, "{by}: {} is not as it was", stage.config.display());
            let left = stage.lab.run(&["exec", "find", "/etc/pillion", LINKS, "-name", "*pillion-*"])?;
            assert_eq!(left.stdout, "", "{by}");
            stage.restart()?;
            let pod = stage.connect(&format!("after-{by}"))?;
            let known = stage.agent.until(&pod.id(), "known", |_| true)?;
            assert!(known["gate"].is_null(), "{known}");
            pod.delete()?;
        }
        stage.end()
    })
}
