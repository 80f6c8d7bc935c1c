//! The protocol of `pillion-hook` on arbitrary bytes: no panic, nothing beyond its limits, and what is accepted can be sent on.
//!
//! Run from the repository's root, with nightly and cargo-fuzz:
//! `cargo +nightly fuzz run gate fuzz/corpus/gate fuzz/seeds/gate -- -max_len=65536 -timeout=10`

#![no_main]

use libfuzzer_sys::fuzz_target;
use pillion_common::hook::{Answer, GateFile, HEADER, Message, Request, body_length, decode, encode};

fuzz_target!(|data: &[u8]| {
    whole::<Request>(data);
    whole::<Answer>(data);
    if let Ok(file) = GateFile::parse(data) {
        let text = file.to_json().expect("what was read can be written");
        assert_eq!(GateFile::parse(&text).as_ref(), Ok(&file));
        assert!(file.closed().count() <= file.policies.len());
    }
});

fn whole<T: Message + PartialEq + std::fmt::Debug>(data: &[u8]) {
    // With its header, as it comes from a socket, and the body alone.
    if let Some((header, body)) = data.split_first_chunk::<HEADER>()
        && let Ok(length) = body_length::<T>(header)
    {
        assert!(length <= T::LIMIT);
        message::<T>(body.get(..length).unwrap_or(body));
    }
    message::<T>(data);
}

fn message<T: Message + PartialEq + std::fmt::Debug>(body: &[u8]) {
    let Ok(message) = decode::<T>(body) else { return };
    // JSON may grow when written again, beyond the limit, but never changes its meaning.
    if let Ok(frame) = encode(&message) {
        assert_eq!(decode::<T>(&frame[HEADER..]).as_ref(), Ok(&message));
    }
}
