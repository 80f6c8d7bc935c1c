//! The bytes on an NRI socket: a multiplexer of connections, and ttrpc messages in each of them.
//!
//! Owns both formats and their bounds. Pure: never does IO, never looks into a message. What comes in is hostile until it
//! is parsed: a length is believed only within its bound, and anything unknown is an error, not skipped.
//!
//! A frame of the multiplexer (`pkg/net/multiplex` of containerd/nri) is a connection's number and a length, both 32 bits
//! big endian, and so many bytes. A ttrpc message (`PROTOCOL.md` of containerd/ttrpc) is a length, a stream's number, a
//! type and flags (4, 4, 1 and 1 bytes, big endian), and so many bytes. Messages and frames need not end together.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

/// What ttrpc allows in one message (`messageLengthMax`).
pub(super) const MESSAGE_LIMIT: usize = 4 << 20;
const MESSAGE_HEADER: usize = 10;
const FRAME_HEADER: usize = 8;
/// What the multiplexer allows in one frame.
const FRAME_LIMIT: usize = MESSAGE_HEADER + MESSAGE_LIMIT;

/// Why bytes are no NRI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum FrameError {
    /// A length beyond the bound.
    #[error("the runtime announces {length} bytes at once; the protocol allows {limit}")]
    TooLong {
        /// What was announced.
        length: usize,
        /// What is allowed.
        limit: usize,
    },
    /// Neither of the two connections.
    #[error("the runtime speaks on connection {0}; there are only 1 and 2")]
    Connection(u32),
    /// Neither a request nor a response.
    #[error("the runtime sends a ttrpc message of type {0} where only requests and responses belong")]
    Kind(u8),
    /// A stream's number that does not follow.
    #[error("the runtime opens ttrpc stream {stream}, but its streams are odd and {last} was the last one")]
    Stream {
        /// What was opened.
        stream: u32,
        /// The one before.
        last: u32,
    },
}

/// One of the two connections within the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Connection {
    /// The runtime asks the plug-in.
    Plugin,
    /// The plug-in asks the runtime.
    Runtime,
}

impl Connection {
    fn number(self) -> u32 {
        match self {
            Self::Plugin => 1,
            Self::Runtime => 2,
        }
    }
}

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Request,
    Response,
}

/// A ttrpc message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) stream: u32,
    pub(super) kind: Kind,
    pub(super) payload: Bytes,
}

/// Takes messages out of the bytes of a socket, however they were cut.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    /// As read from the socket; less than a frame is left in it.
    trunk: BytesMut,
    /// Less than a message each.
    plugin: BytesMut,
    runtime: BytesMut,
}

impl Decoder {
    /// Where to read into.
    pub(super) fn input(&mut self) -> &mut BytesMut {
        &mut self.trunk
    }

    /// The next message; `None` when more bytes are needed.
    pub(super) fn next(&mut self) -> Result<Option<(Connection, Message)>, FrameError> {
        loop {
            if let Some(message) = take_message(&mut self.plugin)? {
                return Ok(Some((Connection::Plugin, message)));
            }
            if let Some(message) = take_message(&mut self.runtime)? {
                return Ok(Some((Connection::Runtime, message)));
            }
            let Some((connection, bytes)) = take_frame(&mut self.trunk)? else { return Ok(None) };
            match connection {
                Connection::Plugin => self.plugin.extend_from_slice(&bytes),
                Connection::Runtime => self.runtime.extend_from_slice(&bytes),
            }
        }
    }
}

/// A message as one frame. One that is too long is the caller's mistake, and is an error too.
pub(super) fn encode(
    connection: Connection,
    kind: Kind,
    stream: u32,
    payload: &[u8],
) -> Result<Bytes, FrameError> {
    let too_long = FrameError::TooLong { length: payload.len(), limit: MESSAGE_LIMIT };
    let length = u32::try_from(payload.len()).map_err(|_| too_long)?;
    if payload.len() > MESSAGE_LIMIT {
        return Err(too_long);
    }
    let mut frame = BytesMut::with_capacity(FRAME_HEADER + MESSAGE_HEADER + payload.len());
    frame.put_u32(connection.number());
    frame.put_u32(length + 10);
    frame.put_u32(length);
    frame.put_u32(stream);
    frame.put_u8(match kind {
        Kind::Request => 1,
        Kind::Response => 2,
    });
    frame.put_u8(0);
    frame.put_slice(payload);
    Ok(frame.freeze())
}

fn take_frame(trunk: &mut BytesMut) -> Result<Option<(Connection, Bytes)>, FrameError> {
    let Some((mut header, rest)) = trunk.split_at_checked(FRAME_HEADER) else { return Ok(None) };
    let connection = match header.get_u32() {
        1 => Connection::Plugin,
        2 => Connection::Runtime,
        other => return Err(FrameError::Connection(other)),
    };
    let length = bounded(header.get_u32(), FRAME_LIMIT)?;
    if rest.len() < length {
        trunk.reserve(FRAME_HEADER + length - trunk.len());
        return Ok(None);
    }
    trunk.advance(FRAME_HEADER);
    Ok(Some((connection, trunk.split_to(length).freeze())))
}

fn take_message(connection: &mut BytesMut) -> Result<Option<Message>, FrameError> {
    let Some((mut header, rest)) = connection.split_at_checked(MESSAGE_HEADER) else { return Ok(None) };
    let length = bounded(header.get_u32(), MESSAGE_LIMIT)?;
    let stream = header.get_u32();
    let kind = match header.get_u8() {
        1 => Kind::Request,
        2 => Kind::Response,
        other => return Err(FrameError::Kind(other)),
    };
    if rest.len() < length {
        return Ok(None);
    }
    connection.advance(MESSAGE_HEADER);
    Ok(Some(Message { stream, kind, payload: connection.split_to(length).freeze() }))
}

fn bounded(length: u32, limit: usize) -> Result<usize, FrameError> {
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > limit { Err(FrameError::TooLong { length, limit }) } else { Ok(length) }
}

/// The numbers of the streams that a client opens: odd, each greater than the one before.
#[derive(Debug, Default)]
pub(super) struct Streams {
    last: u32,
}

impl Streams {
    /// A request opens this stream.
    pub(super) fn open(&mut self, stream: u32) -> Result<(), FrameError> {
        if stream.is_multiple_of(2) || stream <= self.last {
            return Err(FrameError::Stream { stream, last: self.last });
        }
        self.last = stream;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decoded(bytes: &[u8]) -> Result<Vec<(Connection, Message)>, FrameError> {
        let mut decoder = Decoder::default();
        decoder.input().extend_from_slice(bytes);
        std::iter::from_fn(|| decoder.next().transpose()).collect()
    }

    #[test]
    fn what_is_not_the_protocol_is_refused() {
        let header = |connection: u32, length: u32| [connection.to_be_bytes(), length.to_be_bytes()].concat();
        let message = |length: u32, kind: u8| {
            let body = [&length.to_be_bytes()[..], &[0, 0, 0, 1, kind, 0]].concat();
            [header(1, 10), body].concat()
        };
        let limit = u32::try_from(MESSAGE_LIMIT).expect("fits");
        for (bytes, error) in [
            (header(0, 0), FrameError::Connection(0)),
            (header(3, 0), FrameError::Connection(3)),
            (header(1, u32::MAX), FrameError::TooLong { length: u32::MAX as usize, limit: FRAME_LIMIT }),
            (message(limit + 1, 1), FrameError::TooLong { length: MESSAGE_LIMIT + 1, limit: MESSAGE_LIMIT }),
            (message(0, 0), FrameError::Kind(0)),
            (message(0, 3), FrameError::Kind(3)),
        ] {
            assert_eq!(decoded(&bytes), Err(error), "{bytes:?}");
        }
        // At the bound, and not there yet.
        assert_eq!(decoded(&message(limit, 1)), Ok(Vec::new()));
        assert_eq!(decoded(&header(2, 10)), Ok(Vec::new()));
        assert_eq!(decoded(&[]), Ok(Vec::new()));
        let long = encode(Connection::Plugin, Kind::Response, 1, &vec![0; MESSAGE_LIMIT + 1]);
        assert!(matches!(long, Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn streams_are_odd_and_rise() {
        let mut streams = Streams::default();
        for (stream, good) in
            [(1, true), (1, false), (2, false), (7, true), (5, false), (u32::MAX, true), (1, false)]
        {
            assert_eq!(streams.open(stream).is_ok(), good, "{stream}");
        }
    }

    fn messages() -> impl Strategy<Value = Vec<(bool, bool, u32, Vec<u8>)>> {
        let payload = proptest::collection::vec(any::<u8>(), 0..300);
        proptest::collection::vec((any::<bool>(), any::<bool>(), any::<u32>(), payload), 0..8)
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = decoded(&bytes);
            let _ = decoded(&[&[0, 0, 0, 1, 0, 0, 1, 0][..], &bytes].concat());
        }

        /// However the bytes are cut, by the socket or by the multiplexer, the same messages come out.
        #[test]
        fn messages_survive_any_cut(messages in messages(), cut in 1_usize..40, frame in 1_usize..40) {
            let (mut whole, mut framed, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
            for (plugin, request, stream, payload) in messages {
                let connection = if plugin { Connection::Plugin } else { Connection::Runtime };
                let kind = if request { Kind::Request } else { Kind::Response };
                let bytes = encode(connection, kind, stream, &payload).expect("short enough");
                whole.extend_from_slice(&bytes);
                for piece in bytes[FRAME_HEADER..].chunks(frame) {
                    framed.extend(connection.number().to_be_bytes());
                    framed.extend(u32::try_from(piece.len()).expect("short").to_be_bytes());
                    framed.extend(piece);
                }
                wanted.push((connection, Message { stream, kind, payload: payload.into() }));
            }
            prop_assert_eq!(&decoded(&whole).expect("well formed"), &wanted);
            let (mut decoder, mut found) = (Decoder::default(), Vec::new());
            for piece in framed.chunks(cut) {
                decoder.input().extend_from_slice(piece);
                while let Some(message) = decoder.next().expect("well formed") {
                    found.push(message);
                }
            }
            prop_assert_eq!(found, wanted);
        }
    }
}
