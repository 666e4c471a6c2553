//! A server in this process that serves files by path, unless it is told to misbehave, and remembers what it was asked.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::model::Digest;
use crate::provisioner::pullers::manifest::Descriptor;
use crate::provisioner::unpack::Hasher;

/// One request as it came.
#[derive(Clone, Debug, Default)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub headers: HashMap<String, String>,
    pub body: String,
    /// How many came before it.
    pub n: usize,
}

impl Request {
    pub fn has(&self, header: &str, value: &str) -> bool {
        self.headers.get(header).is_some_and(|v| v == value)
    }

    /// Where its range begins.
    pub fn from(&self) -> Option<usize> {
        self.headers.get("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

/// What to answer, and how much of the body is really sent.
#[derive(Clone, Default)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub send: usize,
    /// After `send` bytes the connection stays open and silent until the stub goes.
    pub hang: bool,
}

impl Answer {
    pub fn ok(body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        Self { status: 200, headers: vec![], send: body.len(), body, hang: false }
    }

    pub fn status(status: u16) -> Self {
        Self { status, ..Self::ok("") }
    }

    pub fn error(status: u16, code: &str) -> Self {
        Self { status, ..Self::ok(format!(r#"{{"errors":[{{"code":"{code}","message":"said so"}}]}}"#)) }
    }

    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    /// The part of `body` that was asked for, as an honest server gives it.
    pub fn part(request: &Request, body: &[u8]) -> Self {
        match request.from() {
            None => Self::ok(body),
            Some(from) => Self { status: 206, ..Self::ok(&body[from..]) }.header("Content-Range", format!("bytes {from}-{}/{}", body.len() - 1, body.len())),
        }
    }

    /// Only the first `n` bytes of it arrive.
    pub fn cut(mut self, n: usize) -> Self {
        self.send = self.send.min(n);
        self
    }
}

type Handler = dyn Fn(&Request) -> Option<Answer> + Send + Sync;

pub struct Stub {
    pub host: String,
    pub shared: Arc<Shared>,
}

pub struct Shared {
    pub files: Mutex<HashMap<String, (String, Vec<u8>)>>,
    handler: Box<Handler>,
    seen: Mutex<Vec<Request>>,
    count: AtomicUsize,
    ended: AtomicBool,
    hung: Mutex<Vec<TcpStream>>,
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.shared.hung.lock().unwrap().clear();
        // Wakes the accepting thread.
        let _ = TcpStream::connect(&self.host);
    }
}

impl Stub {
    pub fn new(handler: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let shared = Arc::new(Shared {
            files: Mutex::default(),
            handler: Box::new(handler),
            seen: Mutex::default(),
            count: AtomicUsize::new(0),
            ended: AtomicBool::new(false),
            hung: Mutex::default(),
        });
        let server = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if server.ended.load(Ordering::SeqCst) {
                    return;
                }
                let server = server.clone();
                std::thread::spawn(move || server.serve(stream.unwrap()));
            }
        });
        Self { host, shared }
    }

    pub fn honest() -> Self {
        Self::new(|_| None)
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.host)
    }

    pub fn put(&self, path: &str, media_type: &str, body: &[u8]) {
        self.shared.files.lock().unwrap().insert(path.to_owned(), (media_type.to_owned(), body.to_vec()));
    }

    pub fn blob(&self, repository: &str, bytes: &[u8]) -> Descriptor {
        let blob = descriptor(bytes);
        self.put(&format!("/v2/{repository}/blobs/{}", blob.digest), "application/octet-stream", bytes);
        blob
    }

    pub fn seen(&self, part: &str) -> Vec<Request> {
        self.shared.seen.lock().unwrap().iter().filter(|r| r.path.contains(part)).cloned().collect()
    }
}

impl Shared {
    fn serve(&self, mut stream: TcpStream) {
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut lines = std::iter::from_fn(|| {
            let mut line = String::new();
            reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
            Some(line.trim_end().to_owned()).filter(|l| !l.is_empty())
        });
        let Some(first) = lines.next() else { return };
        let headers: HashMap<String, String> = lines.filter_map(|l| l.split_once(": ").map(|(k, v)| (k.to_lowercase(), v.to_owned()))).collect();
        let mut body = vec![0; headers.get("content-length").and_then(|n| n.parse().ok()).unwrap_or(0)];
        reader.read_exact(&mut body).unwrap();
        let mut words = first.split(' ').map(str::to_owned);
        let (method, path) = (words.next().unwrap(), words.next().unwrap());
        let n = self.count.fetch_add(1, Ordering::SeqCst);
        let request = Request { method, path, headers, body: String::from_utf8(body).unwrap(), n };
        self.seen.lock().unwrap().push(request.clone());
        let answer = (self.handler)(&request).unwrap_or_else(|| match self.files.lock().unwrap().get(&request.path) {
            Some((media_type, body)) => Answer::part(&request, body).header("Content-Type", media_type.clone()),
            None => Answer::status(404),
        });
        let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\nContent-Length: {}\r\n", answer.status, answer.body.len());
        for (name, value) in &answer.headers {
            head += &format!("{name}: {value}\r\n");
        }
        let send = if request.method == "HEAD" { 0 } else { answer.send };
        let _ = stream.write_all(format!("{head}\r\n").as_bytes()).and_then(|()| stream.write_all(&answer.body[..send]));
        if answer.hang {
            self.hung.lock().unwrap().push(stream);
        }
    }
}

pub fn descriptor(bytes: &[u8]) -> Descriptor {
    let digest: Digest = Hasher::of(bytes, None).unwrap();
    Descriptor { media_type: String::new(), digest, size: bytes.len() as u64, platform: None, annotations: None }
}

/// Bytes of which no part looks like another.
pub fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}
