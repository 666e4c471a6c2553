//! `mesocri load` and `mesocri save`: images from and to archives. The daemon reads and writes the store; files named on the
//! command line are read by the daemon, standard input and output go over its socket.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::run::{connect, import, refused};
use crate::model::error::{Act as _, Error, Result};
use crate::stdx::blocking;
use crate::wire::operator::operator_client::OperatorClient;
use crate::wire::operator::{Piece, SaveRequest};

/// Bytes sent at a time.
const PIECE: usize = 256 << 10;
/// Pieces between standard input and the socket.
const PIECES: usize = 4;
/// Standard input or output.
const STANDARD: &str = "-";

/// Their definitions.
pub fn commands(address: &Arg) -> Vec<Command> {
    let load = Command::new("load").about("Import the images of a docker-archive or OCI layout").arg(address.clone()).arg(
        Arg::new("archive")
            .required(true)
            .value_parser(value_parser!(PathBuf))
            .help("file or directory on the daemon's host, maybe compressed; - sends standard input"),
    );
    let save = Command::new("save")
        .about("Write images to an archive")
        .long_about(
            "Write images to an archive.\n\nThe store keeps files, not the blobs they were pulled in: layers are archived anew and uncompressed, \
             so digests and the image's id differ from those of the registry. What was saved and loaded is saved the same again.",
        )
        .arg(address.clone())
        .arg(Arg::new("output").long("output").short('o').value_name("FILE").default_value(STANDARD).help("where to; - is standard output"))
        .arg(
            Arg::new("format")
                .long("format")
                .value_name("FORMAT")
                .value_parser(["oci", "oci-dir", "docker"])
                .default_value("oci")
                .help("OCI layout as a tar file or as a directory, or a docker-archive"),
        )
        .arg(Arg::new("image").required(true).num_args(1..).action(ArgAction::Append).help("name or id of an image in the store"));
    vec![load, save]
}

/// `mesocri load ARCHIVE|-`.
pub async fn load(matches: &ArgMatches) -> Result<ExitCode> {
    let archive = matches.get_one::<PathBuf>("archive").cloned().unwrap_or_default();
    let channel = connect(&super::address(matches)).await?;
    let ids = if archive.as_os_str() == STANDARD {
        send(&channel).await?
    } else {
        let archive = std::fs::canonicalize(&archive).act("find", archive.display())?;
        import(&channel, &archive).await?
    };
    for id in ids {
        println!("{id}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Sends standard input as it comes.
async fn send(channel: &Channel) -> Result<Vec<String>> {
    let (to, pieces) = mpsc::channel(PIECES);
    let reading = std::thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        loop {
            let mut bytes = Vec::with_capacity(PIECE);
            let n = (&mut input).take(PIECE as u64).read_to_end(&mut bytes).act("read", "standard input")?;
            // A daemon that takes no more says why.
            if n == 0 || to.blocking_send(Piece { bytes }).is_err() {
                return Ok::<_, Error>(());
            }
        }
    });
    let answer = OperatorClient::new(channel.clone()).import(ReceiverStream::new(pieces)).await;
    let answer = answer.map_err(|s| refused("load standard input", &s))?;
    // What could not be read must not look like the end.
    reading.join().map_err(|_| Error::internal("read standard input"))??;
    Ok(answer.into_inner().image_ids)
}

/// `mesocri save IMAGE…`.
pub async fn save(matches: &ArgMatches) -> Result<ExitCode> {
    let images: Vec<String> = matches.get_many::<String>("image").map(|v| v.cloned().collect()).unwrap_or_default();
    let output = matches.get_one::<String>("output").cloned().unwrap_or_default();
    let format = matches.get_one::<String>("format").cloned().unwrap_or_default();
    let channel = connect(&super::address(matches)).await?;
    let directory = format == "oci-dir";
    if directory && output == STANDARD {
        return Err(Error::invalid("save: a directory needs --output DIRECTORY"));
    }
    if output == STANDARD && std::io::IsTerminal::is_terminal(&std::io::stdout()) {
        return Err(Error::invalid("save: an archive is nothing for a terminal; give --output FILE"));
    }
    let request = SaveRequest { images, format: if directory { "oci".to_owned() } else { format } };
    let mut pieces = OperatorClient::new(channel).save(request).await.map_err(|s| refused("save", &s))?.into_inner();
    let (to, received) = std::sync::mpsc::sync_channel::<Vec<u8>>(PIECES);
    let target = output.clone();
    let writing = tokio::task::spawn_blocking(move || match target.as_str() {
        STANDARD => write_out(&received),
        path if directory => write_directory(Path::new(path), &received),
        path => write_file(Path::new(path), &received),
    });
    let mut failed = None;
    while let Some(piece) = pieces.next().await {
        match piece {
            // A writer that left says why.
            Ok(piece) => {
                let to = to.clone();
                let sent = blocking::run("hand on", move || Ok::<_, Error>(to.send(piece.bytes).is_ok())).await?;
                if !sent {
                    break;
                }
            }
            Err(s) => {
                failed = Some(refused("save", &s));
                break;
            }
        }
    }
    // An archive that breaks off must not be taken for a whole one: the last word is an empty piece.
    if failed.is_none() {
        let _ = to.send(Vec::new());
    }
    drop(to);
    let written = writing.await.map_err(|e| Error::with(crate::model::error::Kind::Internal, "write archive", e))?;
    match failed {
        Some(e) => Err(e),
        None => written.map(|()| ExitCode::SUCCESS),
    }
}

type Received = std::sync::mpsc::Receiver<Vec<u8>>;

/// Passes on what comes, until the empty piece; anything else is no end.
fn pass(received: &Received, to: &mut impl Write) -> std::io::Result<()> {
    loop {
        match received.recv() {
            Ok(piece) if piece.is_empty() => return to.flush(),
            Ok(piece) => to.write_all(&piece)?,
            Err(_) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

fn write_out(received: &Received) -> Result<()> {
    pass(received, &mut std::io::stdout().lock()).act("write", "standard output")
}

/// Under another name until it is whole.
fn write_file(path: &Path, received: &Received) -> Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(".mesocri-save-").tempfile_in(parent).act("create a file in", parent.display())?;
    pass(received, &mut file).act("write", path.display())?;
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    file.as_file().set_permissions(readable).act("set mode of", path.display())?;
    file.persist(path).map_err(|e| Error::io(format!("rename to {}", path.display()), e.error))?;
    Ok(())
}

fn write_directory(path: &Path, received: &Received) -> Result<()> {
    if path.exists() {
        return Err(Error::invalid(format!("save to {}: it exists", path.display())));
    }
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let dir = tempfile::Builder::new().prefix(".mesocri-save-").tempdir_in(parent).act("create a directory in", parent.display())?;
    let inner = dir.path().join("layout");
    let (reader, mut writer) = std::io::pipe().act("make", "pipe")?;
    let target = inner.clone();
    let unpacking = std::thread::spawn(move || tar::Archive::new(reader).unpack(&target).act("unpack into", target.display()));
    let passed = pass(received, &mut writer).act("write", path.display());
    drop(writer);
    let unpacked = unpacking.join().map_err(|_| Error::internal("unpack archive"))?;
    unpacked?;
    passed?;
    std::fs::rename(&inner, path).act("rename to", path.display())
}
