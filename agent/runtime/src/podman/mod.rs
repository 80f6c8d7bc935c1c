//! Podman without its API service: by what it writes down.
//!
//! Owns the reading of Podman's files. Never writes one, never takes one of Podman's locks: while Podman starts a container it
//! holds that container's lock, and whoever asks Podman about the container waits for the start, which waits for the gate.
//!
//! | file | what is in it | since |
//! | --- | --- | --- |
//! | `GRAPHROOT/overlay-containers/containers.json` | id, name, image of every container | created |
//! | `RUNROOT/overlay-containers/ID/userdata/pidfile` | the first process | OCI `create` |
//! | `GRAPHROOT/overlay-containers/ID/userdata/config.json` | the program | OCI `create` |
//! | `/run/libpod/events/events.log`, or the journal | labels, with every event | created |
//!
//! Labels are otherwise only in Podman's database (`bolt_state.db` in 4, `db.sql` in 5), which is its own. When no event of a container is kept
//! any more, as of one that was made before the last boot and logged to a file, its labels are not known: no policy selects
//! it by a label, and an annotation of the workload says so.

mod events;
mod files;
mod source;

pub use files::PodmanFiles;
pub use source::PodmanSource;
