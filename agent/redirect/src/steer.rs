//! Instances of `pl_steer`, loaded ahead of need.
//!
//! An `sk_lookup` program cannot tell in which network namespace it runs, so each workload with inbound rules gets an
//! instance of its own that has the workload's number as a constant. Loading one takes about a millisecond, which is
//! too long for a gate: some are kept ready.

use std::{
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use aya::programs::ProgramFd;

use crate::{
    RedirectError,
    object::{self, Constants, STEER_PROGRAM},
};

/// A loaded instance and the number that it serves.
#[derive(Debug)]
pub(crate) struct Steer {
    pub(crate) number: u32,
    pub(crate) program: ProgramFd,
}

/// Instances that wait for a workload.
#[derive(Debug)]
pub(crate) struct SteerPool {
    maps: PathBuf,
    constants: Constants,
    ready: Mutex<Vec<Steer>>,
}

impl SteerPool {
    pub(crate) fn new(maps: PathBuf, constants: Constants) -> Self {
        Self { maps, constants, ready: Mutex::default() }
    }

    /// Loads an instance for `number`.
    pub(crate) fn load(&self, number: u32) -> Result<Steer, RedirectError> {
        let constants = Constants { steer_workload: number, ..self.constants };
        let mut object = object::open(Some(&self.maps), &constants, None)?;
        Ok(Steer { number, program: object::load_program(&mut object, STEER_PROGRAM)? })
    }

    /// Takes an instance that is ready.
    pub(crate) fn take(&self) -> Option<Steer> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    /// How many are ready.
    pub(crate) fn len(&self) -> usize {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub(crate) fn put(&self, steer: Steer) {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner).push(steer);
    }
}
