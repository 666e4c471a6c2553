//! systemd's own socket, made fit for the D-Bus library: systemd signs its messages there with the name that it has on the bus
//! (`org.freedesktop.systemd1`), where the library takes nothing but a connection's name (`:1.2`) and panics.

use std::io;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

/// Bytes of the fixed part of a message's header.
const FIXED: usize = 16;
/// The longest message that D-Bus allows.
const MAX_MESSAGE: usize = 128 << 20;
/// What stands before the sender's name: the field's code, and a signature that says "string".
const SENDER: [u8; 4] = [7, 1, b's', 0];

/// A stream that carries what `systemd` carries, with senders that are names of connections. Ends when either side does.
pub(super) fn renamed(systemd: UnixStream) -> io::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    let (systemd_reads, mut systemd_writes) = systemd.into_split();
    let (mut our_reads, our_writes) = theirs.into_split();
    tokio::spawn(async move {
        tokio::select! {
            _ = tokio::io::copy(&mut our_reads, &mut systemd_writes) => {}
            ended = rename(BufReader::new(systemd_reads), our_writes) => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "connection to systemd ends");
                }
            }
        }
    });
    Ok(ours)
}

async fn rename(mut from: BufReader<OwnedReadHalf>, mut to: OwnedWriteHalf) -> io::Result<()> {
    // The handshake: lines. A message begins with a letter for its byte order, which no line begins with.
    let mut line = Vec::new();
    while let [first, ..] = from.fill_buf().await?
        && !matches!(first, b'l' | b'B')
    {
        line.clear();
        from.read_until(b'\n', &mut line).await?;
        to.write_all(&line).await?;
    }
    let mut message = Vec::new();
    while !from.fill_buf().await?.is_empty() {
        message.resize(FIXED, 0);
        from.read_exact(&mut message).await?;
        let number = |at: usize| {
            let bytes = [message[at], message[at + 1], message[at + 2], message[at + 3]];
            (if message[0] == b'l' { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) }) as usize
        };
        let (body, fields) = (number(4), number(12));
        let length = FIXED.saturating_add(fields.next_multiple_of(8)).saturating_add(body);
        if length > MAX_MESSAGE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message longer than D-Bus allows"));
        }
        message.resize(length, 0);
        from.read_exact(&mut message[FIXED..]).await?;
        rename_sender(&mut message[FIXED..FIXED + fields]);
        to.write_all(&message).await?;
    }
    Ok(())
}

/// Makes `org.…` `:rg.…`, so that nothing moves. Fields begin at multiples of eight; no name or path holds bytes below a blank.
fn rename_sender(fields: &mut [u8]) {
    let start = SENDER.len() + size_of::<u32>();
    for at in (0..fields.len()).step_by(8) {
        if fields[at..].starts_with(&SENDER)
            && let Some(first) = fields.get_mut(at + start)
        {
            *first = b':';
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn senders_become_names_of_connections() {
        let (systemd, far) = UnixStream::pair().unwrap();
        let mut near = renamed(systemd).unwrap();
        let message = |sender: &[u8]| {
            let mut fields = vec![6, 1, b's', 0, 2, 0, 0, 0, b':', b'1', 0, 0, 0, 0, 0, 0];
            fields.extend([7, 1, b's', 0, u8::try_from(sender.len()).unwrap(), 0, 0, 0]);
            fields.extend(sender);
            fields.push(0);
            let length = u8::try_from(fields.len()).unwrap();
            fields.resize(fields.len().next_multiple_of(8), 0);
            let mut message = vec![b'l', 4, 0, 1, 3, 0, 0, 0, 9, 0, 0, 0, length, 0, 0, 0];
            message.extend(fields);
            message.extend([7, 1, 2]);
            message
        };
        let (mut far_reads, mut far_writes) = far.into_split();
        let mut sent = b"OK 1234\r\nAGREE_UNIX_FD\r\n".to_vec();
        sent.extend(message(b"org.x"));
        sent.extend(message(b":1.22"));
        // In pieces, as a stream may come.
        for piece in sent.chunks(11) {
            far_writes.write_all(piece).await.unwrap();
        }
        let mut expected = b"OK 1234\r\nAGREE_UNIX_FD\r\n".to_vec();
        expected.extend(message(b":rg.x"));
        expected.extend(message(b":1.22"));
        let mut got = vec![0; expected.len()];
        near.read_exact(&mut got).await.unwrap();
        assert_eq!(got, expected);
        near.write_all(b"up").await.unwrap();
        let mut up = [0; 2];
        far_reads.read_exact(&mut up).await.unwrap();
        assert_eq!(&up, b"up");
        drop((far_reads, far_writes));
        assert_eq!(near.read(&mut up).await.unwrap(), 0, "systemd's end is ours");
    }
}
