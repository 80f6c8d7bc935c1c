//! The harness of the suites in `tests/`: real namespaces, cgroups, processes and runtimes, and a proof that nothing is left.
//!
//! A suite is a file in `tests/tests/`; each of its tests runs within [`on_machine`], which demands root, keeps other suites
//! off the machine meanwhile, and compares the machine before and after. Every resource is a guard that undoes itself when
//! dropped; every wait has a deadline. Never used by the agent; knows it only as a program (see [`programs`]).

#![expect(clippy::missing_panics_doc, reason = "a panic fails the test, which is what it is for")]

pub mod agent;
pub mod bench;
pub mod cgroup;
pub mod cluster;
pub mod containerd;
pub mod crowd;
pub mod demo;
pub mod differ;
pub mod dns;
pub mod duo;
pub mod echo;
pub mod engines;
pub mod first;
pub mod foreign;
pub mod held;
pub mod hooked;
pub mod image;
pub mod inventory;
pub mod lab;
pub mod machine;
pub mod netns;
pub mod pods;
pub mod process;
pub mod programs;
pub mod puppet;
pub mod ready;
pub mod run;
pub mod scene;
pub mod systemd;
pub mod vm;
pub mod wait;

pub use agent::Agent;
pub use cgroup::CgroupGuard;
pub use containerd::Containerd;
pub use echo::EchoServer;
pub use engines::Engine;
pub use foreign::Foreign;
pub use held::Held;
pub use hooked::{Hooks, Way};
pub use inventory::Inventory;
pub use lab::Lab;
pub use machine::{Machine, on_machine, on_machine_within};
pub use netns::{End, NetNs};
pub use pods::{Pod, PodSpec, Pods};
pub use process::{Finished, ProcessGuard};
pub use puppet::{Place, Puppet};
pub use run::PillionRun;
pub use wait::{wait_for, wait_until};
