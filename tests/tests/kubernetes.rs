//! Pillion in Kubernetes, from `kubectl apply` to a node with nothing left on it: one story on one cluster, told step by step.
//!
//! The cluster is the one that `KUBECONFIG` names, or is brought up by the script that `PILLION_CLUSTER` names. Without
//! either this suite fails, and `cargo xtask test` leaves it out and says so. What is on the node is looked at where the node is
//! this machine (`CONTAINERD_ADDRESS`); everything else is asked of Kubernetes and of `pillion` in the agent's pod.

use std::{collections::BTreeMap, env, net::SocketAddrV4, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use pillion_tests::{
    Inventory, Machine, cgroup,
    cluster::{Cluster, IMAGE_VARIABLE, NAMESPACE},
    first, on_machine, process, wait_for, wait_until,
};
use serde_json::Value;

const DAEMONSET: &str = "packaging/kubernetes";
const CLEANUP: &str = "packaging/kubernetes/cleanup";
/// The agent's program on the node: a command in the agent's container runs on the node, as the agent itself does.
const PILLION: &str = "/var/lib/pillion/bin/pillion";
/// A ConfigMap is on the node when its kubelet has looked: at most its sync period and the time to live of its cache.
const CONFIG_MAP: Duration = Duration::from_secs(150);
const SOON: Duration = Duration::from_secs(60);
/// Of what is captured from its first instruction.
const REPLICAS: usize = 3;
/// Pods of a Job, some of them at once.
const COMPLETIONS: usize = 20;
const PARALLELISM: usize = 5;

#[test]
fn from_apply_to_cleanup() -> Result<()> {
    // What a failing kubectl says is in its error.
    process::keep_quiet();
    on_machine(|machine| {
        let cluster = Cluster::open(machine)?;
        let story = Story { machine, cluster: &cluster };
        let told = story.tell();
        if told.is_err() {
            story.say_what_the_agent_said();
        }
        // Its error is that of the story, where there is one.
        let closed = cluster.close();
        told.and(closed)
    })
}

struct Story<'a> {
    machine: &'a Machine,
    cluster: &'a Cluster,
}

impl Story<'_> {
    fn tell(&self) -> Result<()> {
        let before = Inventory::take()?;
        self.install().context("the DaemonSet")?;
        let server = self.server().context("a server")?;
        self.first_instruction(server).context("a Deployment's first instructions")?;
        self.one_run_of_many(server).context("the first instructions of a Job's pods")?;
        self.live_policies().context("a changed ConfigMap")?;
        let steady = self.steady(server).context("a pod that connects all the time")?;
        self.agent_replaced(&steady).context("the agent's pod replaced")?;
        self.agent_absent(server).context("no agent")?;
        self.pod_deleted().context("a deleted pod")?;
        self.removed(&before).context("everything removed")
    }

    fn install(&self) -> Result<()> {
        let image = env::var_os(IMAGE_VARIABLE).with_context(|| {
            format!("{IMAGE_VARIABLE} names no image; make one with: cargo xtask dist image --program target/debug/pillion")
        })?;
        self.cluster.import(&PathBuf::from(image))?;
        self.cluster.kubectl(&["apply", "-k", DAEMONSET])?;
        self.policies(&[("captured", "client", "closed")])?;
        self.rolled_out()?;
        self.in_force(&["captured"])
    }

    /// Policies of a name, for pods of the default namespace with a label `app`, and their failure mode.
    fn policies(&self, policies: &[(&str, &str, &str)]) -> Result<()> {
        let documents: Vec<String> = policies
            .iter()
            .map(|(name, app, on_failure)| {
                format!(
                    "    apiVersion: pillion.dev/v1alpha1\n    kind: InjectionPolicy\n    metadata: {{ name: {name} }}\n    spec:\n      \
                     select: {{ runtimes: [containerd], namespaces: [default], labels: {{ app: {app} }} }}\n      \
                     companions: [{{ name: relay, builtin: relay }}]\n      \
                     redirect: {{ outbound: [{{ to: relay }}] }}\n      onFailure: {on_failure}\n"
                )
            })
            .collect();
        let manifest = format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{ name: pillion-policy, namespace: {NAMESPACE} }}\ndata:\n  \
             policies.yaml: |\n{}",
            documents.join("    ---\n")
        );
        self.cluster.apply(self.machine, "policies.yaml", &manifest)
    }

    fn rolled_out(&self) -> Result<()> {
        self.cluster
            .kubectl(&["-n", NAMESPACE, "rollout", "status", "daemonset/pillion", "--timeout=90s"])
            .map(drop)
    }

    /// What `pillion` says on the node.
    fn pillion(&self, arguments: &[&str]) -> Result<Value> {
        let exec = ["-n", NAMESPACE, "exec", "daemonset/pillion", "--", PILLION];
        let done = self.cluster.run(&[&exec, arguments, &["-o", "json"]].concat())?;
        // status exits with 5 when something is amiss, which kubectl passes on.
        serde_json::from_str(&done.stdout).with_context(|| format!("{arguments:?}: {}", done.stderr))
    }

    fn workloads(&self) -> Result<Vec<Value>> {
        Ok(self.pillion(&["list"])?["workloads"].as_array().cloned().unwrap_or_default())
    }

    /// Those of pods whose names begin so.
    fn workloads_of(&self, pod: &str) -> Result<Vec<Value>> {
        let mut found = self.workloads()?;
        found.retain(|workload| workload["name"].as_str().is_some_and(|name| name.starts_with(pod)));
        Ok(found)
    }

    fn in_force(&self, wanted: &[&str]) -> Result<()> {
        let mut last = Value::Null;
        wait_until("the policies of the ConfigMap in force", CONFIG_MAP, || {
            last = self.pillion(&["status"]).unwrap_or_default()["policies"].clone();
            let names: Vec<&str> = last["policies"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|p| p["name"].as_str())
                .collect();
            names == wanted
        })
        .with_context(|| last.to_string())
    }

    /// A pod that echoes at port 8080; it is outside of every policy.
    fn server(&self) -> Result<SocketAddrV4> {
        let manifest = "apiVersion: v1\nkind: Pod\nmetadata: { name: server, labels: { app: server } }\nspec:\n  \
             terminationGracePeriodSeconds: 0\n  containers:\n  - name: echo\n    image: localhost/busybox:1\n    \
             imagePullPolicy: IfNotPresent\n    command: [nc, -ll, -p, \"8080\", -e, cat]\n    \
             readinessProbe: { tcpSocket: { port: 8080 }, periodSeconds: 1 }\n";
        self.cluster.apply(self.machine, "server.yaml", manifest)?;
        let address = self.cluster.pods("a server that listens", "app=server", |pods| {
            let pod = pods.first().filter(|pod| ready(pod))?;
            pod["status"]["podIP"].as_str()?.parse().ok()
        })?;
        Ok(SocketAddrV4::new(address, 8080))
    }

    /// Each container of each pod makes one connection, with its first instruction, and ends. The relay must have a record of each.
    fn first_instruction(&self, server: SocketAddrV4) -> Result<()> {
        let program = first::build(self.machine.directory(), "first", server)?;
        self.cluster.import_program("first:1", &program)?;
        let manifest = format!(
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{ name: first }}\nspec:\n  replicas: {REPLICAS}\n  \
             selector: {{ matchLabels: {{ app: client }} }}\n  template:\n    metadata: {{ labels: {{ app: client }} }}\n    \
             spec:\n      terminationGracePeriodSeconds: 0\n      initContainers:\n      \
             - {{ name: init, image: \"localhost/first:1\", imagePullPolicy: IfNotPresent }}\n      containers:\n      \
             - {{ name: main, image: \"localhost/first:1\", imagePullPolicy: IfNotPresent }}\n"
        );
        self.cluster.apply(self.machine, "first.yaml", &manifest)?;
        let runs = self.cluster.pods("all containers have run", "app=client", |pods| {
            all_runs(pods).filter(|runs| runs.len() == REPLICAS)
        })?;
        let mut ids = BTreeMap::new();
        for pod in runs.keys() {
            let workloads = self.workloads_of(pod)?;
            ensure!(workloads.len() == 1, "a pod is one workload: {pod}: {workloads:?}");
            let workload = &workloads[0];
            ensure!(workload["verdict"] == "attached", "{workload}");
            ensure!(workload["firstInstruction"] == "before", "{workload}");
            ensure!(workload["gate"].is_string(), "{workload}");
            ids.insert(workload["id"].as_str().context("an id")?.to_owned(), pod);
        }
        // Containers run again now and then, so runs are counted before and after the records: what went past the relay is
        // missing for ever.
        let mut last = String::new();
        wait_until("as many records as connections, of each pod", SOON, || {
            let counts = || {
                let pods = self.cluster.get(&["pods", "-l", "app=client"]).ok()?;
                all_runs(pods["items"].as_array()?)
            };
            let (before, records, after) = (counts(), self.records(server).unwrap_or_default(), counts());
            last = format!("runs {before:?}, records {records:?}, runs {after:?}");
            before.is_some_and(|runs| {
                after.is_some_and(|after| after == runs)
                    && ids.iter().all(|(id, pod)| records.get(id) == runs.get(*pod))
            })
        })
        .with_context(|| last)?;
        self.cluster
            .kubectl(&["delete", "deployment", "first", "--wait=true", "--cascade=foreground"])
            .map(drop)
    }

    /// In each pod of a Job an init container and then the main one run once, and connect with their first instruction: of each
    /// pod there must be two records.
    fn one_run_of_many(&self, server: SocketAddrV4) -> Result<()> {
        let earlier = self.records(server)?;
        let manifest = format!(
            "apiVersion: batch/v1\nkind: Job\nmetadata: {{ name: many }}\nspec:\n  completions: {COMPLETIONS}\n  \
             parallelism: {PARALLELISM}\n  backoffLimit: 0\n  template:\n    metadata: {{ labels: {{ app: client }} }}\n    \
             spec:\n      restartPolicy: Never\n      terminationGracePeriodSeconds: 0\n      initContainers:\n      \
             - {{ name: init, image: \"localhost/first:1\", imagePullPolicy: IfNotPresent }}\n      containers:\n      \
             - {{ name: main, image: \"localhost/first:1\", imagePullPolicy: IfNotPresent }}\n"
        );
        self.cluster.apply(self.machine, "many.yaml", &manifest)?;
        self.cluster.pods("pods of the Job that ran to a good end", "job-name=many", |pods| {
            let ended = pods.iter().filter(|pod| pod["status"]["phase"] == "Succeeded");
            (ended.count() == COMPLETIONS).then_some(())
        })?;
        let mut last = BTreeMap::new();
        wait_until("records of every container", SOON, || {
            last = self.records(server).unwrap_or_default();
            last.retain(|workload, _| !earlier.contains_key(workload));
            last.len() == COMPLETIONS && last.values().all(|records| *records == 2)
        })
        .with_context(|| format!("{COMPLETIONS} pods with two each, and there are {last:?}"))?;
        self.cluster.kubectl(&["delete", "job", "many", "--wait=true", "--cascade=foreground"]).map(drop)
    }

    /// The relays' records of connections to the server that went well, by the log of the agent that runs.
    fn log(&self, server: SocketAddrV4) -> Result<Vec<Value>> {
        let log = self.cluster.kubectl(&["-n", NAMESPACE, "logs", "daemonset/pillion", "--tail=-1"])?;
        let record = |line: &str| {
            let line = serde_json::from_str::<Value>(line).ok()?;
            let record = serde_json::from_str::<Value>(line["message"].as_str()?).ok()?;
            (record["destination"] == server.to_string() && record["outcome"] == "ok").then_some(record)
        };
        Ok(log.lines().filter_map(record).collect())
    }

    /// How many there are of each workload.
    fn records(&self, server: SocketAddrV4) -> Result<BTreeMap<String, usize>> {
        let mut counted = BTreeMap::new();
        for record in self.log(server)? {
            *counted.entry(record["workload"].as_str().unwrap_or_default().to_owned()).or_default() += 1;
        }
        Ok(counted)
    }

    /// A running pod is attached when the ConfigMap gets a policy for it, and is detached when it loses it.
    fn live_policies(&self) -> Result<()> {
        self.pod("late", "late", "sleep 100000")?;
        self.cluster.pods("a pod that runs", "app=late", |pods| ready(pods.first()?).then_some(()))?;
        let verdict = |wanted: &str| {
            let mut last = Vec::new();
            wait_until(&format!("the pod is {wanted}"), SOON, || {
                last = self.workloads_of("late").unwrap_or_default();
                last.first().is_some_and(|workload| workload["verdict"] == wanted)
            })
            .with_context(|| format!("{last:?}"))
        };
        verdict("notMatched")?;
        self.policies(&[
            ("captured", "client", "closed"),
            ("late", "late", "open"),
            ("open", "open", "open"),
        ])?;
        self.in_force(&["captured", "late", "open"])?;
        verdict("attached")?;
        ensure!(self.workloads_of("late")?[0]["firstInstruction"] == "after");
        self.delete_pod("late")
    }

    fn pod(&self, name: &str, app: &str, script: &str) -> Result<()> {
        let manifest = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{ name: {name}, labels: {{ app: {app} }} }}\nspec:\n  \
             terminationGracePeriodSeconds: 0\n  restartPolicy: OnFailure\n  containers:\n  - name: main\n    \
             image: localhost/busybox:1\n    imagePullPolicy: IfNotPresent\n    command: [sh, -c, \"{script}\"]\n"
        );
        self.cluster.apply(self.machine, &format!("{name}.yaml"), &manifest)
    }

    fn delete_pod(&self, name: &str) -> Result<()> {
        self.cluster.kubectl(&["delete", "pod", name, "--wait=true"]).map(drop)
    }

    /// A pod of a closed policy that connects again and again and says how it went; returns its workload.
    fn steady(&self, server: SocketAddrV4) -> Result<Value> {
        let script = format!(
            "while :; do test x = $(echo x | nc {} {}) && echo ok || echo failed; sleep 0.1; done",
            server.ip(),
            server.port()
        );
        self.pod("steady", "client", &script)?;
        self.goes_on("a first connection")?;
        let workload = self.workloads_of("steady")?.pop().context("the pod is a workload")?;
        ensure!(workload["verdict"] == "attached" && workload["firstInstruction"] == "before", "{workload}");
        let id = workload["id"].as_str().context("an id")?.to_owned();
        wait_until("records of the pod", SOON, || {
            self.records(server).is_ok_and(|records| records.contains_key(&id))
        })?;
        Ok(workload)
    }

    /// Every connection so far went through, and the next ones do.
    fn goes_on(&self, what: &str) -> Result<()> {
        let said = || self.cluster.kubectl(&["logs", "steady"]).unwrap_or_default();
        let count = |text: &str| text.lines().filter(|line| *line == "ok").count();
        let before = count(&said());
        wait_until(what, SOON, || count(&said()) > before + 5)?;
        let said = said();
        ensure!(!said.contains("failed"), "{what}: {said}");
        Ok(())
    }

    fn agent_replaced(&self, steady: &Value) -> Result<()> {
        let companion = |workload: &Value| workload["companions"][0]["pid"].as_i64();
        let relay = companion(steady).context("its companion's pid")?;
        let agent = self.pillion(&["status"])?["pid"].as_i64();
        self.cluster.kubectl(&["-n", NAMESPACE, "delete", "pod", "-l", "app.kubernetes.io/name=pillion"])?;
        self.goes_on("connections while the agent is replaced")?;
        self.rolled_out()?;
        wait_until("another agent", SOON, || {
            self.pillion(&["status"]).is_ok_and(|status| status["pid"].as_i64() != agent)
        })?;
        let now = self.workloads_of("steady")?.pop().context("the new agent knows the pod")?;
        ensure!(now["verdict"] == "attached", "{now}");
        ensure!(companion(&now) == Some(relay), "the companion was {relay}: {now}");
        ensure!(now["companions"][0]["restarts"] == 0, "{now}");
        self.goes_on("connections under the new agent")
    }

    /// Without an agent, pods of an open policy run as if Pillion were not there; those of a closed one wait for it.
    fn agent_absent(&self, server: SocketAddrV4) -> Result<()> {
        let nowhere = |node: &str| {
            let patch = format!(
                r#"{{"spec":{{"template":{{"spec":{{"nodeSelector":{{"pillion.dev/elsewhere":{node}}}}}}}}}}}"#
            );
            self.cluster.kubectl(&["-n", NAMESPACE, "patch", "daemonset", "pillion", "-p", &patch]).map(drop)
        };
        nowhere("\"true\"")?;
        wait_until("no agent", SOON, || {
            self.cluster
                .get(&["pods", "-n", NAMESPACE])
                .is_ok_and(|pods| pods["items"].as_array().is_some_and(Vec::is_empty))
        })?;
        let connect = format!("test x = $(echo x | nc {} {})", server.ip(), server.port());
        self.pod("undisturbed", "open", &connect)?;
        self.pod("refused", "client", &connect)?;
        self.cluster.pods("a pod of an open policy that ran", "app=open", |pods| {
            (pods.first()?["status"]["phase"] == "Succeeded").then_some(())
        })?;
        let mut last = Vec::new();
        wait_until("an event that names Pillion and the policy", SOON, || {
            last = self.cluster.events_of("refused").unwrap_or_default();
            last.iter().any(|message| message.contains("pillion") && message.contains("captured"))
        })
        .with_context(|| format!("events: {last:#?}"))?;
        self.goes_on("connections without an agent")?;

        nowhere("null")?;
        self.rolled_out()?;
        let address = self.cluster.pods("the refused pod ran under the new agent", "app=client", |pods| {
            let pod = pods.iter().find(|pod| pod["metadata"]["name"] == "refused")?;
            (pod["status"]["phase"] == "Succeeded")
                .then(|| pod["status"]["podIP"].as_str().map(str::to_owned))?
        })?;
        // The pod is over, and with it the workload: its address is left to know it by.
        let captured = |record: &Value| {
            record["source"].as_str().is_some_and(|source| source.starts_with(&format!("{address}:")))
        };
        wait_until("its record", SOON, || self.log(server).is_ok_and(|log| log.iter().any(captured)))?;
        self.delete_pod("undisturbed")?;
        self.delete_pod("refused")
    }

    fn pod_deleted(&self) -> Result<()> {
        self.pod("gone", "client", "sleep 100000")?;
        let workload = wait_for("the pod's workload", SOON, || self.workloads_of("gone").ok()?.pop())?;
        let id = workload["id"].as_str().context("an id")?.replace('/', "+");
        self.cluster.pods("it runs", "app=client", |pods| {
            ready(pods.iter().find(|pod| pod["metadata"]["name"] == "gone")?).then_some(())
        })?;
        if let Some(root) = self.cluster.node_root()? {
            ensure!(root.join("var/lib/pillion/companions").join(&id).is_dir(), "its companion has files");
        }
        self.delete_pod("gone")?;
        wait_until("nothing of the pod", SOON, || {
            let files = self
                .cluster
                .node_root()
                .ok()
                .flatten()
                .is_some_and(|root| root.join("var/lib/pillion/companions").join(&id).exists());
            let cgroups = cgroup::mounts().is_ok_and(|mounts| {
                mounts.iter().any(|(_, mount)| mount.join("pillion.slice").join(&id).exists())
            });
            !files && !cgroups && self.workloads_of("gone").is_ok_and(|workloads| workloads.is_empty())
        })
    }

    /// The way back, with pods of policies still running.
    fn removed(&self, before: &Inventory) -> Result<()> {
        self.cluster.kubectl(&["apply", "-k", CLEANUP])?;
        self.rolled_out()?;
        let proof = self.cluster.kubectl(&["-n", NAMESPACE, "logs", "daemonset/pillion", "-c", "cleanup"])?;
        ensure!(proof.contains("BEFORE"), "{proof}");
        for line in proof.lines().skip_while(|line| !line.starts_with("KIND")).skip(1) {
            ensure!(line.split_whitespace().last() == Some("0"), "something is left: {proof}");
        }
        self.goes_on("connections without Pillion")?;
        self.cluster.kubectl(&["delete", "-k", CLEANUP, "--wait=true"])?;

        if let Some(root) = self.cluster.node_root()? {
            for path in ["var/lib/pillion", "run/pillion", "sys/fs/bpf/pillion"] {
                ensure!(!root.join(path).exists(), "/{path} is left on the node");
            }
            let mounts = self.cluster.node_mounts()?;
            ensure!(!mounts.contains(" - bpf pillion"), "a mount is left on the node: {mounts}");
        }
        let kernel = ["program:", "map:", "link:", "pin:"];
        let left = |line: &String| {
            kernel.iter().any(|kind| line.starts_with(kind))
                || line.contains("pillion.slice")
                || line.contains(PILLION)
        };
        let mut found = Vec::new();
        wait_until("nothing of Pillion on the node", SOON, || {
            found = Inventory::take().map_or_else(
                |error| vec![error.to_string()],
                |now| now.added_since(before).into_iter().filter(left).collect(),
            );
            found.is_empty()
        })
        .with_context(|| found.join("\n"))?;
        self.delete_pod("steady")?;
        self.delete_pod("server")
    }

    #[expect(clippy::print_stderr, reason = "libtest keeps it and shows it with a failing test")]
    fn say_what_the_agent_said(&self) {
        for arguments in [
            &["get", "pods", "-A", "-o", "wide"][..],
            &["-n", NAMESPACE, "logs", "daemonset/pillion", "--tail=60"],
            &["-n", NAMESPACE, "describe", "pods"],
            &["get", "events", "--sort-by=.lastTimestamp"],
        ] {
            if let Ok(said) = self.cluster.run(arguments) {
                let from = said.stdout.len().saturating_sub(12_000);
                eprintln!(
                    "--- kubectl {}\n{}{}",
                    arguments.join(" "),
                    &said.stdout.get(from..).unwrap_or(""),
                    said.stderr
                );
            }
        }
    }
}

fn ready(pod: &Value) -> bool {
    let statuses = pod["status"]["containerStatuses"].as_array();
    statuses.is_some_and(|all| !all.is_empty() && all.iter().all(|status| status["ready"] == true))
}

/// Of each pod, by its name.
fn all_runs(pods: &[Value]) -> Option<BTreeMap<String, usize>> {
    pods.iter().map(|pod| Some((pod["metadata"]["name"].as_str()?.to_owned(), runs(pod)?))).collect()
}

/// How often containers of a pod have run to a good end; nothing while one is at it, or has not yet, or ended otherwise.
fn runs(pod: &Value) -> Option<usize> {
    let statuses = |kind: &str| pod["status"][kind].as_array().cloned().unwrap_or_default();
    let (inits, mains) = (statuses("initContainerStatuses"), statuses("containerStatuses"));
    let mut runs = 0;
    for status in inits.iter().chain(&mains) {
        let ended = &status["state"]["terminated"];
        let before = &status["lastState"]["terminated"];
        if status["state"]["running"].is_object() || (ended.is_null() && before.is_null()) {
            return None;
        }
        if [ended, before].iter().any(|end| end["exitCode"].as_i64().is_some_and(|code| code != 0)) {
            return None;
        }
        // Also while it waits for its next run.
        runs += usize::try_from(status["restartCount"].as_u64()?).ok()? + 1;
    }
    (inits.len() == 1 && mains.len() == 1).then_some(runs)
}

#[test]
fn runs_are_counted() {
    let pod = |main: Value| {
        serde_json::json!({ "status": {
            "initContainerStatuses": [{ "restartCount": 0, "state": { "terminated": { "exitCode": 0 } } }],
            "containerStatuses": [main],
        }})
    };
    let good = serde_json::json!({ "exitCode": 0 });
    let bad = serde_json::json!({ "exitCode": 2 });
    for (main, count) in [
        (serde_json::json!({ "restartCount": 0, "state": { "terminated": good } }), Some(2)),
        (
            serde_json::json!({ "restartCount": 1, "state": { "waiting": {} }, "lastState": { "terminated": good } }),
            Some(3),
        ),
        (
            serde_json::json!({ "restartCount": 1, "state": { "terminated": good }, "lastState": { "terminated": good } }),
            Some(3),
        ),
        (
            serde_json::json!({ "restartCount": 1, "state": { "running": {} }, "lastState": { "terminated": good } }),
            None,
        ),
        (serde_json::json!({ "restartCount": 0, "state": { "waiting": {} } }), None),
        (serde_json::json!({ "restartCount": 0, "state": { "terminated": bad } }), None),
    ] {
        assert_eq!(runs(&pod(main.clone())), count, "{main}");
    }
}
