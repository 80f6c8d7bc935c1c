//! Which rule, if any, decides on a destination. Nothing of the socket is changed here.

use aya_ebpf::{btf_maps::lpm_trie::Key, helpers::generated::bpf_get_current_uid_gid};
use pillion_common::{
    AF_INET, Counter, Destination, Network4, Network6, Route, RouteKey, TCP, UserKey, WorkloadConfig, flags,
    trace::why,
};

use crate::{
    maps::{PL_NETS4, PL_NETS6, PL_ROUTES, PL_USERS, count},
    program,
    socket::{LOOPBACK4, ONE, is_local4, is_local6, is_multicast4, is_multicast6},
};

const DNS_PORT_BE: u16 = 53_u16.to_be();

/// The rule for `destination`, or why it passes. Loopback passes, but for questions to resolvers; multicast and
/// broadcast always do.
#[inline(always)]
pub fn decide(config: &WorkloadConfig, destination: &Destination, protocol: u8) -> Result<Route, u8> {
    let packed = decide_route(config, destination, u32::from(protocol));
    let route =
        Route { companion_port: packed as u16, flags: (packed >> 16) as u16, rule: (packed >> 32) as u32 };
    if route.flags & Route::REDIRECT != 0 { Ok(route) } else { Err(route.rule as u8) }
}

apart! {
    /// The route in one word; without flags, the reason is in the place of the rule.
    fn decide_route(
        config: *const WorkloadConfig,
        destination: *const Destination,
        protocol: u32,
    ) -> u64 {
        // SAFETY: the verifier sees to it that they are null or what they are said to be.
        let (Some(config), Some(destination)) = (unsafe { (config.as_ref(), destination.as_ref()) }) else {
            return 0;
        };
        match find(config, destination, protocol as u8) {
            Ok(route) => {
                u64::from(route.rule) << 32 | u64::from(route.flags) << 16 | u64::from(route.companion_port)
            }
            Err(why) => u64::from(why) << 32,
        }
    }
}

#[inline(always)]
fn find(config: &WorkloadConfig, destination: &Destination, protocol: u8) -> Result<Route, u8> {
    let is4 = destination.family == AF_INET;
    let (local, multicast) = if is4 {
        (is_local4(destination.address[0]), is_multicast4(destination.address[0]))
    } else {
        (is_local6(&destination.address), is_multicast6(&destination.address))
    };
    if multicast {
        return Err(why::MULTICAST);
    }
    if local && (config.flags & flags::DNS == 0 || destination.port_be != DNS_PORT_BE) {
        return Err(why::LOCAL);
    }
    let alone = is_left_alone(config);
    if alone != why::NOTHING {
        count(Counter::OutboundExcluded);
        return Err(alone);
    }
    let route = if config.flags & flags::ONE_ROUTE != 0 {
        if protocol == TCP { config.route } else { Route::default() }
    } else {
        look(config, destination, protocol, is4)
    };
    if local {
        // The companion itself, which listens on the resolvers' port.
        let itself = destination.port_be == route.companion_port.to_be()
            && if is4 { destination.address[0] == LOOPBACK4 } else { destination.address[3] == ONE };
        return if route.flags & Route::DNS != 0 && !itself { Ok(route) } else { Err(why::LOCAL) };
    }
    if route.flags & Route::REDIRECT == 0 {
        count(Counter::OutboundExcluded);
        return Err(why::NO_RULE);
    }
    Ok(route)
}

#[inline(always)]
fn look(config: &WorkloadConfig, destination: &Destination, protocol: u8, is4: bool) -> Route {
    let table = config.table;
    let class = if is4 {
        let key = Key::new(64, Network4 { table, address: destination.address[0] });
        if config.flags & flags::NETWORKS4 != 0 { PL_NETS4.get(&key).copied() } else { None }
    } else {
        let key = Key::new(160, Network6 { table, address: destination.address });
        if config.flags & flags::NETWORKS6 != 0 { PL_NETS6.get(&key).copied() } else { None }
    };
    let key = RouteKey {
        table,
        class: class.unwrap_or(0),
        protocol: u16::from(protocol),
        port_be: destination.port_be,
    };
    PL_ROUTES.get(&Key::new(RouteKey::BITS, key)).copied().unwrap_or_default()
}

/// Why whatever this process sends passes, if it does.
#[inline(always)]
fn is_left_alone(config: &WorkloadConfig) -> u8 {
    if config.flags & flags::USERS != 0 {
        // SAFETY: takes nothing, returns numbers.
        let user = unsafe { bpf_get_current_uid_gid() } as u32;
        if PL_USERS.get_ptr(UserKey { table: config.table, user }).is_some() {
            return why::USER;
        }
    }
    if config.flags & flags::EXECUTABLES != 0 && program::is_left_alone(config.table) {
        return why::EXECUTABLE;
    }
    why::NOTHING
}
