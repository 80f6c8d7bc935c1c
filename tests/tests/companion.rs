//! Companions under an agent: the processes that they are started from.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path, time::Duration};

use anyhow::{Result, ensure};
use nix::sys::signal::{self, Signal};
use pillion_tests::{
    Agent, on_machine,
    process::descendants,
    scene::{Scene, companion_pid, id, web},
    wait_until,
};

const SOON: Duration = Duration::from_secs(30);

/// Children of the agent that wait to become companions.
fn waiting(agent: &mut Agent) -> Result<Vec<u32>> {
    let parent = i32::try_from(agent.process()?.pid())?;
    let mut found = Vec::new();
    for pid in descendants([parent]).into_iter().filter(|pid| *pid != parent) {
        // Between fork and exec it has the agent's own command line.
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if command.split('\0').nth(1) == Some("companion") {
            found.push(u32::try_from(pid)?);
        }
    }
    Ok(found)
}

#[test]
fn companions_start_from_processes_that_wait_while_a_policy_has_any() -> Result<()> {
    on_machine(|machine| {
        let mut scene = Scene::new(machine)?;
        scene.agent.run()?;
        ensure!(waiting(&mut scene.agent)?.is_empty(), "without policies there is nothing to start");
        let file = scene.agent.policy("web.yaml", &web("closed", ""))?;
        let mut first = Vec::new();
        wait_until("two that wait", SOON, || {
            first = waiting(&mut scene.agent).unwrap_or_default();
            first.len() == 2
        })?;

        // One of them becomes the relay, closed to all but what it needs, and another takes its place.
        let mut puppet = scene.web("first")?;
        scene.says_through_relay(&mut puppet)?;
        let relay = u32::try_from(companion_pid(&scene.agent.until_verdict(&id("first"), "attached")?)?)?;
        ensure!(first.contains(&relay), "{relay} is none of {first:?}");
        assert_eq!(fs::read_to_string(format!("/proc/{relay}/comm"))?.trim(), "pillion-relay");
        for descriptor in fs::read_dir(format!("/proc/{relay}/fd"))? {
            let target = fs::read_link(descriptor?.path())?.to_string_lossy().into_owned();
            let expected = ["/dev/null", "socket:", "anon_inode:", "pipe:", "/proc/", "/log/"];
            ensure!(expected.iter().any(|part| target.contains(part)), "the relay has {target}");
        }
        // Not dumpable: nothing of it is readable for others of its user.
        assert_eq!(fs::metadata(format!("/proc/{relay}/environ"))?.uid(), 0);
        let mut others = Vec::new();
        wait_until("two that wait, again", SOON, || {
            others = waiting(&mut scene.agent).unwrap_or_default();
            others.retain(|pid| *pid != relay);
            others.len() == 2
        })?;

        // When somebody kills them, a start has to wait for a process, and that is all.
        for pid in others {
            signal::kill(nix::unistd::Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
        }
        let mut another = scene.web("second")?;
        scene.says_through_relay(&mut another)?;

        // They go with the agent, however that ends, and with the last policy.
        wait_until("two that wait, once more", SOON, || {
            waiting(&mut scene.agent).is_ok_and(|all| all.len() >= 2)
        })?;
        let all = waiting(&mut scene.agent)?;
        let relays =
            [relay, u32::try_from(companion_pid(&scene.agent.until_verdict(&id("second"), "attached")?)?)?];
        scene.agent.stop(Signal::SIGKILL)?;
        wait_until("nobody who waits", SOON, || {
            all.iter().all(|pid| relays.contains(pid) == Path::new(&format!("/proc/{pid}")).exists())
        })?;
        scene.agent.run()?;
        scene.says_through_relay(&mut puppet)?;
        drop((puppet, another));
        for name in ["first", "second"] {
            scene.agent.until_forgotten(&id(name))?;
        }
        wait_until("others that wait", SOON, || waiting(&mut scene.agent).is_ok_and(|all| all.len() == 2))?;
        fs::remove_file(file)?;
        wait_until("none that wait", SOON, || waiting(&mut scene.agent).is_ok_and(|all| all.is_empty()))?;
        scene.end()
    })
}
