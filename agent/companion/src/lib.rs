//! Skeleton.

pub mod relay;
