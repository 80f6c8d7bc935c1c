//! The launcher: a small single-threaded program between the agent and what the agent starts.
//!
//! A multi-threaded parent may do almost nothing between fork and exec, so the agent starts `pillion launch` with
//! plain `posix_spawn`, and that process, alone with one thread, joins cgroups, enters the network namespace, drops
//! privileges and replaces itself by the program. The pid stays the same all the way.
//!
//! # How it is told
//! Its standard input is one end of a Unix socket pair, the *control socket*. No descriptor is inherited by number:
//! `dup2` to 0, 1 and 2 is what spawning does anyway, every other descriptor of the agent is close-on-exec, and what
//! the launcher needs beyond that travels as `SCM_RIGHTS` over the control socket, so that no concurrently spawned
//! process can ever inherit it. The parent writes one message before it spawns:
//!
//! 1. the byte `S` with descriptors: a memfd with the [`LaunchSpec`] as JSON, then, in this order and only if the
//!    specification says so, the network namespace, the program's standard input, the program.
//!
//! The launcher answers on the same socket, which is close-on-exec:
//!
//! 2. with a gate: the byte `H` when all is done but the exec. It then reads one byte; `G` releases it, and the end of
//!    the stream (the parent has gone) ends it without an exec.
//! 3. end of stream: the program runs. Or the byte `E` and a [`LaunchFailure`] as JSON: it does not.

mod child;
mod handover;
mod parent;
mod raw;
mod spec;

pub use child::main;
pub(crate) use handover::memory_file;
pub use parent::{Held, LaunchError, Launching, Output, Request, spawn};
pub use spec::{
    Identity, InputSpec, LaunchFailure, LaunchSpec, Limit, LimitKind, NamespaceSpec, ParentDeath, Privileges,
    Program, Session,
};
