//! Layers over connections that break, from servers that cannot count, at limits.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use super::*;

#[tokio::test]
async fn what_arrived_is_not_fetched_again() {
    let bytes = noise(1_000_000);
    let blob = descriptor(&bytes);
    let body = bytes.clone();
    let stub = Stub::new(move |r| Some(Answer::part(r, &body).cut(150_000 + 1000 * r.n)));
    let (got, result) = fetch(&endpoint(&stub, "a", &Config { pull_retries: 2, ..Config::default() }, None).await, &blob).await;
    result.unwrap();
    assert_eq!(got, bytes);
    let starts: Vec<usize> = stub.seen("").iter().map(|r| r.from().unwrap_or(0)).collect();
    // Each goes on where the last one was cut, which is seven times although only two retries are allowed without progress.
    assert_eq!(starts, [0, 150_000, 301_000, 453_000, 606_000, 760_000, 915_000]);
}

#[tokio::test]
async fn servers_that_cannot_begin_in_the_middle() {
    let bytes = noise(600_000);
    let blob = descriptor(&bytes);
    type Serve = fn(&Request, &[u8]) -> Answer;
    let servers: [(&str, Serve); 5] = [
        ("ignores ranges", |_, body| Answer::ok(body)),
        ("refuses ranges", |r, body| if r.from().is_some() { Answer::status(416) } else { Answer::ok(body) }),
        ("gives another part", |r, body| match r.from() {
            Some(from) => Answer::part(&Request { headers: [("range".into(), format!("bytes={}-", from + 1))].into(), ..r.clone() }, body),
            None => Answer::ok(body),
        }),
        ("begins earlier", |r, body| match r.from() {
            Some(from) => Answer::part(&Request { headers: [("range".into(), format!("bytes={}-", from - 5000))].into(), ..r.clone() }, body),
            None => Answer::ok(body),
        }),
        ("says nothing about its part", |r, body| Answer { headers: vec![], ..Answer::part(r, body) }),
    ];
    for (name, serve) in servers {
        let body = bytes.clone();
        let stub = Stub::new(move |r| Some(serve(r, &body).cut(if r.n == 0 { 250_000 } else { usize::MAX })));
        let (got, result) = fetch(&endpoint(&stub, "a", &Config::default(), None).await, &blob).await;
        result.unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(got == bytes, "{name}: {} bytes", got.len());
        assert_eq!(stub.seen("").get(1).and_then(Request::from), Some(250_000), "{name}");
    }
}

#[tokio::test]
async fn no_progress_is_the_end() {
    let bytes = noise(300_000);
    let blob = descriptor(&bytes);
    let body = bytes.clone();
    let stub = Stub::new(move |r| Some(Answer::part(r, &body).cut(if r.n == 0 { 100_000 } else { 10 })));
    let (got, result) = fetch(&endpoint(&stub, "a", &Config { pull_retries: 2, ..Config::default() }, None).await, &blob).await;
    let error = result.unwrap_err();
    assert_eq!(error.kind, Kind::Unavailable);
    assert!(error.to_string().starts_with("RegistryUnavailable: fetch sha256:"), "{error}");
    assert_eq!((got.len(), stub.seen("").len()), (100_020, 3));
    assert_eq!(got, bytes[..got.len()]);
}

#[tokio::test]
async fn another_host_goes_on_where_the_first_one_broke_off() {
    let bytes = noise(500_000);
    let body = bytes.clone();
    let mirror = Stub::new(move |r| Some(if r.n == 0 { Answer::ok(&body[..]).cut(200_000) } else { Answer::status(503) }));
    let stub = Stub::honest();
    let blob = stub.blob("a", &bytes);
    let endpoint = endpoint(&stub, "a", &mirrored(&stub, &[&mirror]), None).await;
    let (got, result) = fetch(&endpoint, &blob).await;
    result.unwrap();
    assert_eq!(got, bytes);
    assert_eq!(stub.seen("/blobs/").iter().map(Request::from).collect::<Vec<_>>(), [Some(200_000)]);
}

#[tokio::test]
async fn an_answer_of_the_wrong_length_is_refused_before_a_byte_of_it_is_used() {
    let bytes = noise(50_000);
    let mirror = Stub::new(|_| Some(Answer::ok(vec![0; 60_000])));
    let stub = Stub::honest();
    let blob = stub.blob("a", &bytes);
    let (got, result) = fetch(&endpoint(&stub, "a", &mirrored(&stub, &[&mirror]), None).await, &blob).await;
    result.unwrap();
    assert_eq!((got == bytes, mirror.seen("").len()), (true, 1));
    // Alone, it is an error.
    let (got, result) = fetch(&endpoint(&mirror, "a", &Config::default(), None).await, &blob).await;
    assert_eq!((got.len(), result.unwrap_err().kind), (0, Kind::DataLoss));
    // One that ends early without saying so is one that broke.
    let short = Stub::new(|_| Some(Answer::ok(vec![0; 40_000])));
    let (_, result) = fetch(&endpoint(&short, "a", &Config { pull_retries: 0, ..Config::default() }, None).await, &blob).await;
    assert_eq!(result.unwrap_err().kind, Kind::Unavailable);
}

#[tokio::test]
async fn a_server_that_falls_silent_is_left() {
    let bytes = noise(300_000);
    let blob = descriptor(&bytes);
    let body = bytes.clone();
    let stub = Stub::new(move |r| {
        let answer = Answer::part(r, &body);
        Some(if r.n == 0 { Answer { hang: true, ..answer.cut(100_000) } } else { answer })
    });
    let config = Config { stall_timeout_seconds: 1, ..Config::default() };
    let (got, result) = fetch(&endpoint(&stub, "a", &config, None).await, &blob).await;
    result.unwrap();
    assert!(got == bytes && stub.seen("")[1].from() == Some(100_000));
}

#[tokio::test]
async fn the_node_takes_no_more_than_it_may() {
    let stub = Stub::honest();
    let blobs: Vec<Descriptor> = (1..=3).map(|n| stub.blob("a", &noise(100_000 * n))).collect();
    let registries = Registries::new(&Config { max_bytes_per_second: 400_000, ..Config::default() });
    let (one, two) = (endpoint_of(&registries, &stub, "a", None).await, endpoint_of(&registries, &stub, "a", None).await);
    let began = Instant::now();
    let (a, b, c) = tokio::join!(fetch(&one, &blobs[0]), fetch(&two, &blobs[1]), fetch(&two, &blobs[2]));
    assert!([a, b, c].iter().all(|(_, result)| result.is_ok()));
    // 600 kB at 400 kB/s, less the burst, over two pulls.
    assert!(began.elapsed() >= Duration::from_millis(1200), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_transfers_at_once_than_allowed() {
    const ALL: usize = 6;
    for limit in [1, 2] {
        // Running, highest, ended. Each answer waits until as many run as may.
        let state = Arc::new((Mutex::new((0, 0, 0)), Condvar::new()));
        let bytes = noise(100_000);
        let (body, shared) = (bytes.clone(), state.clone());
        let stub = Stub::new(move |_| {
            let (lock, changed) = &*shared;
            let mut state = lock.lock().unwrap();
            state.0 += 1;
            state.1 = state.1.max(state.0);
            changed.notify_all();
            let mut state = changed.wait_while(state, |(running, _, ended)| *running + *ended < ALL.min(*ended + limit)).unwrap();
            state.0 -= 1;
            state.2 += 1;
            changed.notify_all();
            Some(Answer::ok(&body[..]))
        });
        let blob = descriptor(&bytes);
        let registries = Registries::new(&Config { max_parallel_downloads: limit, ..Config::default() });
        let endpoint = endpoint_of(&registries, &stub, "a", None).await;
        let all = futures_util::future::join_all((0..ALL).map(|_| fetch(&endpoint, &blob))).await;
        assert!(all.iter().all(|(got, result)| result.is_ok() && *got == bytes));
        assert_eq!(state.0.lock().unwrap().1, limit);
    }
}
