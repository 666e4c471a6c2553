//! Signatures of archives: detached OpenPGP signatures beside them, checked by GnuPG's `gpgv` against the operator's keyring
//! (App Container specification, image archive signing). Everything in the keyring is trusted; a key that has
//! expired or was revoked is not, whatever it signed.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::process::Command;

use crate::model::error::{Act, Error, Kind, Result};

/// The program.
const PROGRAM: &str = "gpgv";
/// Time it may take; it reads some hundred megabytes a second.
const DEADLINE: Duration = Duration::from_secs(600);
/// Bytes of its answer that are read.
const MAX_ANSWER: u64 = 64 << 10;
/// Most bytes of a signature that are fetched.
pub const MAX_SIGNATURE: u64 = 64 << 10;

/// Checks that `signature` is one of `archive` by a key in `keyring`, and returns the fingerprint of that key.
///
/// # Errors
/// `PermissionDenied` when it is not, `FailedPrecondition` when it cannot be checked: no program, no keyring.
pub async fn verify(keyring: &Path, archive: &File, signature: &File) -> Result<String> {
    if !keyring.is_absolute() || !keyring.is_file() {
        return Err(Error::precondition(format!("check signature: appc_keyring {} is no file with an absolute path", keyring.display())));
    }
    // Neither file has a name; the program opens ours. What it says goes by the status, not by words.
    let ours = |file: &File| format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let mut command = Command::new(PROGRAM);
    command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path))).env("HOME", "/nonexistent");
    command.args(["--status-fd", "1", "--keyring"]).arg(keyring).args([ours(signature), ours(archive)]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let mut child = match command.spawn() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::precondition(format!("check signature: appc_keyring is set and there is no {PROGRAM} here (Debian: package gpgv)")));
        }
        other => other.act("start", PROGRAM)?,
    };
    let talk = async {
        let mut said = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            stdout.take(MAX_ANSWER).read_to_end(&mut said).await?;
        }
        Ok::<_, std::io::Error>((child.wait().await?, said))
    };
    let Ok(ended) = tokio::time::timeout(DEADLINE, talk).await else {
        return Err(Error::new(Kind::DeadlineExceeded, format!("check signature: no answer of {PROGRAM} within {} s, killed", DEADLINE.as_secs())));
    };
    let (status, said) = ended.act("talk to", PROGRAM)?;
    judge(status.success(), &String::from_utf8_lossy(&said))
}

/// What the status lines mean (GnuPG, DETAILS): exactly one good signature and nothing against it.
fn judge(success: bool, said: &str) -> Result<String> {
    let lines: Vec<Vec<&str>> = said.lines().filter_map(|line| line.strip_prefix("[GNUPG:] ")).map(|line| line.split(' ').collect()).collect();
    let has = |word: &str| lines.iter().find(|line| line.first() == Some(&word));
    let refused = |why: &str| Err(Error::new(Kind::PermissionDenied, format!("check signature: {why}")));
    if has("BADSIG").is_some() {
        return refused("it is not that of this archive");
    }
    if let Some(missing) = has("NO_PUBKEY") {
        return refused(&format!("its key {} is not in appc_keyring", missing.get(1).unwrap_or(&"")));
    }
    for (word, why) in
        [("EXPKEYSIG", "its key has expired"), ("REVKEYSIG", "its key was revoked"), ("EXPSIG", "it has expired"), ("ERRSIG", "it cannot be checked")]
    {
        if has(word).is_some() {
            return refused(why);
        }
    }
    match (success, has("GOODSIG"), has("VALIDSIG").and_then(|line| line.get(1))) {
        (true, Some(_), Some(fingerprint)) => Ok((*fingerprint).to_owned()),
        _ => refused("it is none"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_good_signature_is_one() {
        let good = "[GNUPG:] NEWSIG\n[GNUPG:] GOODSIG 1234 Me <me@x>\n[GNUPG:] VALIDSIG ABCD 2024-01-01 0\n";
        assert_eq!(judge(true, good).unwrap(), "ABCD");
        for (success, said, words) in [
            (false, good, "none"),
            (true, "", "none"),
            (true, "[GNUPG:] GOODSIG 1234 Me\n", "none"),
            // A user id is no status line, whatever it says.
            (true, "[GNUPG:] NEWSIG GOODSIG\nGOODSIG 1 x\nVALIDSIG AB\n", "none"),
            (false, "[GNUPG:] BADSIG 1234 Me\n", "not that of this archive"),
            (true, "[GNUPG:] EXPKEYSIG 1234 Me\n[GNUPG:] VALIDSIG ABCD\n", "expired"),
            (true, "[GNUPG:] REVKEYSIG 1234 Me\n[GNUPG:] VALIDSIG ABCD\n", "revoked"),
            (false, "[GNUPG:] ERRSIG 1234 1 8 00 1 9\n[GNUPG:] NO_PUBKEY 1234\n", "key 1234 is not in"),
        ] {
            let error = judge(success, said).unwrap_err();
            assert!(error.kind == Kind::PermissionDenied && error.to_string().contains(words), "{said}: {error}");
        }
    }
}
