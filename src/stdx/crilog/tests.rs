//! Tests of the log format: cutting, joining, times, torn files.

use super::*;

/// Writes `pieces` through fresh framers and gives the lines back without their time.
fn written(pieces: &[(Stream, &[u8])]) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pod/c/0.log");
    let mut file = LogFile::open(&path).unwrap();
    let (mut out, mut err) = (Framer::new(Stream::Stdout), Framer::new(Stream::Stderr));
    let mut buffer = vec![0; MIN_BATCH];
    for (stream, bytes) in pieces {
        let mut batch = Batch::new(&mut buffer, &mut file, 0);
        match stream {
            Stream::Stdout => out.push(bytes, &mut batch),
            Stream::Stderr => err.push(bytes, &mut batch),
        }
    }
    let mut batch = Batch::new(&mut buffer, &mut file, 0);
    out.finish(&mut batch);
    err.finish(&mut batch);
    drop(batch);
    assert_eq!(file.lost(), 0);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'), "{text:?}");
    text.lines().map(|l| l[STAMP + 1..].to_owned()).collect()
}

#[test]
fn lines_are_framed_and_carriage_returns_dropped() {
    let lines = written(&[(Stream::Stdout, b"a\nbb\r\n\n"), (Stream::Stderr, b"e\n")]);
    assert_eq!(lines, ["stdout F a", "stdout F bb", "stdout F ", "stderr F e"]);
}

#[test]
fn pieces_of_a_line_join_and_streams_do_not_mix() {
    let lines = written(&[(Stream::Stdout, b"he"), (Stream::Stderr, b"x\n"), (Stream::Stdout, b"llo\r"), (Stream::Stdout, b"\nend")]);
    assert_eq!(lines, ["stderr F x", "stdout F hello", "stdout P end"]);
}

#[test]
fn a_carriage_return_inside_a_line_stays() {
    assert_eq!(written(&[(Stream::Stdout, b"50%\r100%\n")]), ["stdout F 50%\r100%"]);
}

/// Every way to cut the input into reads gives the same lines.
#[test]
fn long_lines_are_cut_at_the_limit_however_they_arrive() {
    for extra in [0usize, 1, 2, MAX_LINE, MAX_LINE + 1] {
        for ending in ["\n", "\r\n", ""] {
            let mut text = vec![b'x'; MAX_LINE + extra];
            text.extend_from_slice(ending.as_bytes());
            let whole = written(&[(Stream::Stdout, &text)]);
            for cut in [1, MAX_LINE - 1, MAX_LINE, MAX_LINE + 1, text.len() - 1] {
                let cut = cut.min(text.len());
                let halves = written(&[(Stream::Stdout, &text[..cut]), (Stream::Stdout, &text[cut..])]);
                assert_eq!(halves, whole, "extra {extra}, ending {ending:?}, cut {cut}");
            }
            let sizes: Vec<usize> = whole.iter().map(|l| l.len() - "stdout F ".len()).collect();
            assert_eq!(sizes.iter().sum::<usize>(), MAX_LINE + extra);
            assert!(sizes[..sizes.len() - 1].iter().all(|n| *n == MAX_LINE), "{sizes:?}");
            let tags: String = whole.iter().map(|l| &l[7..8]).collect();
            let last = if ending.is_empty() { "P" } else { "F" };
            assert_eq!(tags, "P".repeat(whole.len() - 1) + last, "extra {extra}, ending {ending:?}");
        }
    }
}

#[test]
fn many_short_lines_in_one_read_leave_in_few_whole_batches() {
    let text = b"y\n".repeat(40_000);
    let lines = written(&[(Stream::Stdout, &text)]);
    assert_eq!(lines.len(), 40_000);
    assert!(lines.iter().all(|l| l == "stdout F y"));
}

#[test]
fn reopening_starts_a_new_file_at_the_same_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.log");
    let mut file = LogFile::open(&path).unwrap();
    let mut framer = Framer::new(Stream::Stdout);
    let mut buffer = vec![0; MIN_BATCH];
    framer.push(b"one\nhal", &mut Batch::new(&mut buffer, &mut file, 0));
    std::fs::rename(&path, dir.path().join("0.log.old")).unwrap();
    file.reopen().unwrap();
    assert!(path.exists(), "the file is there when reopen returns");
    framer.push(b"f\n", &mut Batch::new(&mut buffer, &mut file, 0));
    assert!(std::fs::read_to_string(dir.path().join("0.log.old")).unwrap().ends_with("stdout F one\n"));
    assert!(std::fs::read_to_string(&path).unwrap().ends_with("stdout F half\n"));
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777 & !0o640, 0, "not more than 0640: {mode:o}");
}

#[test]
fn a_full_disk_loses_lines_but_not_the_writer() {
    // Every write to it fails with ENOSPC.
    let file = std::fs::OpenOptions::new().append(true).open("/dev/full").unwrap();
    let mut file = LogFile { path: PathBuf::from("/dev/full"), file: Some(file), torn: false, lost: 0 };
    let mut buffer = vec![0; MIN_BATCH];
    Framer::new(Stream::Stdout).push(b"gone\n", &mut Batch::new(&mut buffer, &mut file, 0));
    assert_eq!(file.lost(), (FRAME + 4) as u64);
}

#[test]
fn a_log_that_cannot_be_opened_goes_on_when_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.log");
    std::fs::create_dir(&path).unwrap();
    assert!(LogFile::open(&path).is_err());
    let mut file = LogFile::unopened(&path);
    file.append(b"lost\n");
    assert_eq!(file.lost(), 5);
    assert!(file.reopen().is_err());
    std::fs::remove_dir(&path).unwrap();
    file.append(b"kept\n");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "kept\n");
}

#[test]
fn after_a_torn_line_the_next_starts_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.log");
    let mut file = LogFile::open(&path).unwrap();
    file.append(b"2016 stdout F hal");
    let mut buffer = vec![0; MIN_BATCH];
    Framer::new(Stream::Stdout).push(b"next\n", &mut Batch::new(&mut buffer, &mut file, 0));
    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "2016 stdout F hal");
    assert!(lines[1].ends_with(" stdout F next"));
}

#[test]
fn times_are_calendar_times() {
    let text = |ns| String::from_utf8(stamp(ns).to_vec()).unwrap();
    assert_eq!(text(0), "1970-01-01T00:00:00.000000000Z");
    assert_eq!(text(1_475_713_029_669_794_202), "2016-10-06T00:17:09.669794202Z");
    assert_eq!(text(951_782_400_000_000_000), "2000-02-29T00:00:00.000000000Z");
    assert_eq!(text(4_107_542_399_999_999_999), "2100-02-28T23:59:59.999999999Z");
}
