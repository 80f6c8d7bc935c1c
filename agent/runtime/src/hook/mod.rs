//! Containers and units that `pillion-hook` holds.

mod engine;

pub use engine::{DescribeError, Described, Engine};
