//! Nothing is told on kernels without atomic instructions (before Linux 5.12): they verify every function on every path to
//! it, and with what `../trace.rs` does the programs are more than they look at.

use pillion_common::{Destination, Redirected, Route, WorkloadConfig};

/// Whether anything is ever told.
pub const TELLS: bool = false;

/// What the program returns.
#[derive(Clone, Copy)]
pub struct Outcome {
    pub result: i32,
}

impl Outcome {
    #[inline(always)]
    pub fn redirected(_: Route, result: i32) -> Self {
        Self { result }
    }

    #[inline(always)]
    pub fn passed(_: u8, result: i32) -> Self {
        Self { result }
    }

    #[inline(always)]
    pub fn failed_open(_: Route, _: u8, result: i32) -> Self {
        Self { result }
    }

    #[inline(always)]
    pub fn refused(_: Route, _: u8, _: i32, result: i32) -> Self {
        Self { result }
    }
}

#[inline(always)]
pub fn sent(_: u8, _: &WorkloadConfig, _: &Redirected, _: &Outcome) {}

#[inline(always)]
pub fn arrived(_: u8, _: u32, _: &Destination, _: &Destination, _: &Outcome) {}
