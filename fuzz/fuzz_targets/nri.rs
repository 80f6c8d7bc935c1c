//! What a runtime sends over NRI, as arbitrary bytes: the multiplexer, ttrpc and the messages never panic and always end.
//!
//! Run from the repository's root, with nightly and cargo-fuzz:
//! `cargo +nightly fuzz run nri fuzz/corpus/nri fuzz/seeds/nri -- -max_len=8192 -timeout=10`

#![no_main]

use libfuzzer_sys::fuzz_target;
use pillion_runtime::read_nri;

fuzz_target!(|data: &[u8]| {
    let understood = read_nri(data);
    // A request has at least a header of the multiplexer and one of ttrpc.
    assert!(understood * 10 <= data.len());
});
