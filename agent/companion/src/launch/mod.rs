//! The launcher: a small single-threaded program between the agent and what the agent starts.
//!
//! A multi-threaded parent may do almost nothing between fork and exec, so the agent starts `pillion launch` with
//! plain `posix_spawn`, and that process, alone with one thread, joins cgroups, enters the network namespace, drops
//! privileges and becomes the program: by an exec, or, when it is the embedded relay, by calling it. The pid stays the
//! same all the way. Companions' launchers are started as `pillion companion`, which is what a process list shows of a
//! relay; some of them are started ahead of need (`pool`).
//!
//! # How it is told
//! Its standard input is one end of a Unix socket pair, the *control socket*. No descriptor is inherited by number:
//! `dup2` to 0, 1 and 2 is what spawning does anyway, every other descriptor of the agent is close-on-exec, and what
//! the launcher needs beyond that travels as `SCM_RIGHTS` over the control socket, so that no concurrently spawned
//! process can ever inherit it. The parent writes one message; a launcher whose parent goes without one ends:
//!
//! 1. the byte `S` with descriptors: a memfd with the [`LaunchSpec`] as JSON, then, in this order and only if the
//!    specification says so, the network namespace, the program's standard input, output and error.
//!
//! The launcher answers on the same socket, which is close-on-exec:
//!
//! 2. with a gate: the byte `H` when all is done but the exec. It then reads one byte; `G` releases it, and the end of
//!    the stream (the parent has gone) ends it without an exec.
//! 3. end of stream: the program runs, the relay listens. Or the byte `E` and a [`LaunchFailure`] as JSON: it does not.

mod child;
mod handover;
mod parent;
mod pool;
mod raw;
mod spec;

/// The hidden command by which a launcher is started.
pub const LAUNCH: &str = "launch";
/// The same for companions: whoever looks at the processes of a machine sees what a relay is for.
pub const COMPANION: &str = "companion";

pub use child::main;
pub use parent::{Held, LaunchError, Launching, Output, Request, spawn};
pub(crate) use pool::Launchers;
pub use spec::{
    Identity, InputSpec, LaunchFailure, LaunchSpec, Limit, LimitKind, NamespaceSpec, OutputSpec, ParentDeath,
    Privileges, Program, Session,
};
