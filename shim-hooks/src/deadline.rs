//! Reading and writing that ends in time.
//!
//! Owns the waiting: every wait of this program, but for the real runtime after its exec, goes through here.

use std::{
    io,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

/// A moment by which something has to be over.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline(Instant);

impl Deadline {
    pub(crate) fn after(duration: Duration) -> Self {
        let now = Instant::now();
        Self(now.checked_add(duration).unwrap_or(now))
    }

    /// What is left; `TimedOut` when nothing is.
    pub(crate) fn left(self) -> io::Result<Duration> {
        let left = self.0.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
    }

    /// Waits for this long, or until the deadline.
    pub(crate) fn pause(self, duration: Duration) {
        if let Ok(left) = self.left() {
            std::thread::sleep(duration.min(left));
        }
    }

    /// Waits until `flags` are there, or an error of the descriptor, which reading or writing tells.
    fn wait(self, fd: &impl AsFd, flags: PollFlags) -> io::Result<()> {
        loop {
            let left = Timespec::try_from(self.left()?).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(fd, flags)], Some(&left)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Reads to the end, at most `limit` bytes. The descriptor may block: it is read only when there is something.
    pub(crate) fn read_to_end(self, fd: &impl AsFd, limit: usize) -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        let mut buffer = [0; 16 << 10];
        loop {
            match self.read(fd, &mut buffer)? {
                [] => return Ok(text),
                some if text.len() + some.len() > limit => {
                    return Err(io::Error::new(
                        io::ErrorKind::FileTooLarge,
                        format!("more than {limit} bytes"),
                    ));
                }
                some => text.extend_from_slice(some),
            }
        }
    }

    /// Fills `buffer`; `UnexpectedEof` when there is less.
    pub(crate) fn read_exact(self, fd: &impl AsFd, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            let read = self.read(fd, buffer)?.len();
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            buffer = buffer.get_mut(read..).unwrap_or_default();
        }
        Ok(())
    }

    fn read<'a>(self, fd: &impl AsFd, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
        loop {
            self.wait(fd, PollFlags::IN)?;
            match rustix::io::read(fd, &mut *buffer) {
                Ok(read) => return Ok(buffer.get(..read).unwrap_or_default()),
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Writes all. The descriptor must not block.
    pub(crate) fn write_all(self, fd: &impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.wait(fd, PollFlags::OUT)?;
            match rustix::io::write(fd, bytes) {
                Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream, thread};

    use super::*;

    #[test]
    fn reads_and_writes_in_pieces() {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let deadline = Deadline::after(Duration::from_secs(20));
        // More than a socket holds.
        let sent: Vec<u8> = (0..3_000_000_u32).map(|number| number.to_le_bytes()[0]).collect();
        let expected = sent.clone();
        let reader = thread::spawn(move || deadline.read_to_end(&far, 4_000_000).unwrap());
        deadline.write_all(&near, &sent).unwrap();
        drop(near);
        assert!(reader.join().unwrap() == expected);
    }

    #[test]
    fn nothing_waits_for_ever_and_nothing_grows_for_ever() {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let soon = Deadline::after(Duration::from_millis(20));
        assert_eq!(soon.read_exact(&far, &mut [0]).unwrap_err().kind(), io::ErrorKind::TimedOut);
        let soon = Deadline::after(Duration::from_millis(20));
        let full = soon.write_all(&near, &vec![0; 8 << 20]).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::TimedOut);
        let deadline = Deadline::after(Duration::from_secs(20));
        assert_eq!(deadline.read_to_end(&far, 1000).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        drop(far);
        assert!(deadline.write_all(&near, b"x").is_err());
    }
}
