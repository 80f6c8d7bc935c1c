//! The suite `redirect` once more, on a data plane that does without whatever a supported kernel may lack: what the suite
//! `vm` sees of a real one, with every check, and on several CPUs.

#[path = "redirect.rs"]
mod redirect;
