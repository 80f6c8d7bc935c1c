//! Asks the kernel whether it takes Pillion's programs: by loading them, not by its version.

use crate::{
    RedirectError,
    features::Kernel,
    object::{self, COMPANION_PROGRAMS, Constants, STEER_PROGRAM, WORKLOAD_PROGRAMS},
};

/// One thing that the kernel was asked for.
#[derive(Debug)]
pub struct Feature {
    /// The program, or `maps`.
    pub name: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// Why it cannot be had.
    pub result: Result<(), RedirectError>,
}

/// Loads maps and every program and drops them again. Nothing is attached or pinned.
pub fn probe() -> Vec<Feature> {
    let constants = |kernel| Constants {
        kernel,
        usable_slots: 1,
        slots_per_workload: 1,
        connections_per_workload: 1,
        slot_expiry: 1,
        steer_workload: 0,
        connections: 1,
        table_entries: 1,
    };
    let mut object = match Kernel::find().and_then(|kernel| object::open(None, &constants(kernel), None)) {
        Ok(object) => object,
        Err(error) => {
            return vec![Feature {
                name: "maps",
                purpose: "state shared with the kernel",
                result: Err(error),
            }];
        }
    };
    let mut features =
        vec![Feature { name: "maps", purpose: "state shared with the kernel", result: Ok(()) }];
    let names = WORKLOAD_PROGRAMS.iter().chain(&COMPANION_PROGRAMS).map(|program| program.name);
    for name in names.chain([STEER_PROGRAM]) {
        let result = object::load_program(&mut object, name).map(drop);
        features.push(Feature { name, purpose: purpose(name), result });
    }
    features
}

fn purpose(program: &str) -> &'static str {
    match program {
        "pl_connect4" | "pl_connect6" => "outbound redirection",
        "pl_peer4" | "pl_peer6" | "pl_name4" | "pl_name6" => "applications see the addresses they asked for",
        "pl_original" => "companions learn original destinations",
        "pl_steer" => "inbound redirection",
        "pl_socket" => "no Multipath TCP, which cannot be redirected faithfully",
        _ => "nothing leaks from connections that fail",
    }
}
