//! Every step of a pod's life is a span with the ids of what it is about, below the span of who asked for it, and no span
//! outlives its work.

use std::fmt::Write as _;
use std::sync::{LazyLock, Mutex};

use tokio::sync::watch;
use tracing::field::{Empty, Field, Visit};
use tracing::span::{Attributes, Record};
use tracing::subscriber::DefaultGuard;
use tracing::{Dispatch, Instrument as _, Subscriber};
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, Registry};

use super::*;
use crate::launcher::ExecSpec;
use crate::model::error::Kind;
use crate::model::resources::Resources;

/// One span, with its fields as text.
struct Seen {
    parent: Option<usize>,
    text: String,
}

/// Collects the spans of the current thread.
#[derive(Clone)]
struct Trace(Arc<Book>);

struct Book {
    spans: Mutex<Vec<Seen>>,
    /// Log lines of level warn and above with the texts of all spans that they were written in, innermost first.
    lines: Mutex<Vec<(String, Vec<usize>)>>,
    open: watch::Sender<usize>,
}

/// Place of a span in the book.
struct Place(usize);

struct Text<'a>(&'a mut String);

impl Visit for Text<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = write!(self.0, " {}={value:?}", field.name());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        let _ = write!(self.0, " {}={value}", field.name());
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Trace {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &tracing::Id, ctx: Context<'_, S>) {
        let span = ctx.span(id).unwrap();
        let parent = span.parent().map(|p| p.extensions().get::<Place>().unwrap().0);
        let mut text = attributes.metadata().name().to_owned();
        attributes.record(&mut Text(&mut text));
        let mut spans = self.0.spans.lock().unwrap();
        span.extensions_mut().insert(Place(spans.len()));
        spans.push(Seen { parent, text });
        self.0.open.send_modify(|open| *open += 1);
    }

    fn on_record(&self, id: &tracing::Id, values: &Record<'_>, ctx: Context<'_, S>) {
        let place = ctx.span(id).unwrap().extensions().get::<Place>().unwrap().0;
        values.record(&mut Text(&mut self.0.spans.lock().unwrap()[place].text));
    }

    fn on_event(&self, event: &tracing::Event<'_>, ctx: Context<'_, S>) {
        if *event.metadata().level() > tracing::Level::WARN {
            return;
        }
        let mut text = String::new();
        event.record(&mut Text(&mut text));
        let scope = ctx.event_scope(event).into_iter().flatten().map(|span| span.extensions().get::<Place>().unwrap().0);
        self.0.lines.lock().unwrap().push((text, scope.collect()));
    }

    fn on_close(&self, _: tracing::Id, _: Context<'_, S>) {
        self.0.open.send_modify(|open| *open -= 1);
    }
}

/// While there is one subscriber in the process, threads without any (other tests) decide for it which spans are of interest: none.
static SECOND: LazyLock<Dispatch> = LazyLock::new(|| Dispatch::new(Registry::default()));

impl Trace {
    fn start() -> (Self, DefaultGuard) {
        let trace = Self(Arc::new(Book { spans: Mutex::default(), lines: Mutex::default(), open: watch::Sender::new(0) }));
        LazyLock::force(&SECOND);
        let guard = tracing::subscriber::set_default(Registry::default().with(trace.clone()));
        (trace, guard)
    }

    /// Runs a request in a span like a front's.
    async fn call<T>(&self, work: impl Future<Output = T>) -> T {
        work.instrument(tracing::info_span!("call", pod = Empty, container = Empty)).await
    }

    /// Waits until every span has ended: no owner, no watch holds one.
    async fn quiet(&self) {
        let mut open = self.0.open.subscribe();
        let quiet = tokio::time::timeout(Duration::from_secs(20), open.wait_for(|open| *open == 0)).await.is_ok();
        assert!(quiet, "spans stay open:\n{}", self.take(&[]));
    }

    /// All spans so far as an indented tree, with short names for ids; forgets them.
    fn take(&self, ids: &[(&str, &str)]) -> String {
        fn branch(spans: &[Seen], of: Option<usize>, depth: usize, tree: &mut String) {
            for (place, span) in spans.iter().enumerate().filter(|(_, s)| s.parent == of) {
                let _ = writeln!(tree, "{:indent$}{}", "", span.text, indent = depth * 2);
                branch(spans, Some(place), depth + 1, tree);
            }
        }
        let mut tree = String::new();
        branch(&std::mem::take(&mut *self.0.spans.lock().unwrap()), None, 0, &mut tree);
        ids.iter().fold(tree, |tree, (id, name)| tree.replace(id, name))
    }
}

/// A tree as a test writes it, without the margin.
fn tree(text: &str) -> String {
    let margin = text.lines().find(|l| !l.trim().is_empty()).map_or(0, |l| l.len() - l.trim_start().len());
    text.lines().filter(|l| !l.trim().is_empty()).map(|l| format!("{}\n", &l[margin..])).collect()
}

#[tokio::test]
async fn a_life_as_a_tree() {
    let (trace, _guard) = Trace::start();
    let bench = Bench::new();
    let pod = trace.call(bench.engine.run_pod(pod_spec("a"))).await.unwrap();
    trace.quiet().await;
    let ids = [(pod.as_str(), "P")];
    let made = "
        call pod=P
          pod.make pod=P
            record pod=P
            start_shim pod=P
            prepare pod=P
              isolator isolator=recorder pod=P
            create_sandbox pod=P
            record pod=P
    ";
    assert_eq!(trace.take(&ids), tree(made));

    let id = trace.call(bench.engine.create_container(pod.as_str(), container_spec("c"))).await.unwrap();
    trace.quiet().await;
    let ids = [(pod.as_str(), "P"), (id.as_str(), "C")];
    let made = "
        call container=C
          container.make pod=P container=C
            record pod=P container=C
            provision pod=P container=C
            prepare pod=P container=C
              isolator isolator=recorder pod=P container=C
            create_task pod=P container=C
            isolate pod=P container=C
              isolator isolator=recorder pod=P container=C
            record pod=P container=C
    ";
    assert_eq!(trace.take(&ids), tree(made));

    trace.call(bench.engine.start_container(id.as_str())).await.unwrap();
    trace.quiet().await;
    let started = "
        call pod=P
          container.start pod=P container=C
            record pod=P container=C
            start_task pod=P container=C
    ";
    assert_eq!(trace.take(&ids), tree(started));

    trace.call(bench.engine.exec_sync(id.as_str(), ExecSpec::default())).await.unwrap();
    trace.call(bench.engine.update_container(id.as_str(), Resources { cpu_shares: Some(3), ..Resources::default() })).await.unwrap();
    trace.quiet().await;
    let used = "
        call pod=P
          container.exec pod=P container=C
        call pod=P
          container.update pod=P container=C
            isolate pod=P container=C
              isolator isolator=recorder pod=P container=C
          record pod=P container=C
    ";
    assert_eq!(trace.take(&ids), tree(used));

    // The exit is nobody's doing as far as anyone can tell: its own root.
    trace.call(bench.engine.stop_container(id.as_str(), Duration::from_secs(20))).await.unwrap();
    trace.quiet().await;
    let stopped = "
        call pod=P
          container.stop pod=P container=C
            grace pod=P container=C
              signal pod=P container=C
        container.exit pod=P container=C
          record pod=P container=C
          delete_task pod=P container=C
    ";
    assert_eq!(trace.take(&ids), tree(stopped));

    trace.call(bench.engine.remove_container(id.as_str())).await.unwrap();
    trace.call(bench.engine.stop_pod(pod.as_str())).await.unwrap();
    trace.call(bench.engine.remove_pod(pod.as_str())).await.unwrap();
    trace.quiet().await;
    let removed = "
        call pod=P
          container.remove pod=P container=C
            cleanup pod=P container=C
              isolator isolator=recorder pod=P container=C
            release pod=P container=C
            erase pod=P container=C
        call
          record pod=P
          pod.stop pod=P
            stop_sandbox pod=P
            delete_sandbox pod=P
            cleanup pod=P
              isolator isolator=recorder pod=P
          record pod=P
        call
          pod.remove pod=P
            erase pod=P
    ";
    assert_eq!(trace.take(&ids), tree(removed));
    bench.assert_empty();
}

#[tokio::test]
async fn what_a_removal_of_the_whole_pod_entails_is_below_its_call() {
    let (trace, _guard) = Trace::start();
    let bench = Bench::new();
    let pod = bench.pod("a").await;
    let id = bench.running(&pod, "c").await;
    trace.quiet().await;
    trace.take(&[]);
    trace.call(bench.engine.remove_pod(pod.as_str())).await.unwrap();
    trace.quiet().await;
    let removed = "
        call
          kill pod=P container=C
          record pod=P
          pod.stop pod=P
            stop_sandbox pod=P
            delete_sandbox pod=P
            cleanup pod=P
              isolator isolator=recorder pod=P
          record pod=P
          container.remove pod=P container=C
            cleanup pod=P container=C
              isolator isolator=recorder pod=P container=C
            release pod=P container=C
            erase pod=P container=C
          pod.remove pod=P
            erase pod=P
        container.exit pod=P container=C
          record pod=P container=C
          delete_task pod=P container=C
    ";
    assert_eq!(trace.take(&[(pod.as_str(), "P"), (id.as_str(), "C")]), tree(removed));
}

#[tokio::test]
async fn a_pod_that_fails_has_its_id_in_span_and_lines() {
    let (trace, _guard) = Trace::start();
    let bench = Bench::new();
    bench.world.fail("create_sandbox", Kind::Internal);
    bench.world.fail("delete_sandbox", Kind::Internal);
    trace.call(bench.engine.run_pod(pod_spec("a"))).await.unwrap_err();
    let pod = bench.engine.pods()[0].id.clone();
    trace.quiet().await;
    let (line, scope) = trace.0.lines.lock().unwrap()[0].clone();
    assert!(line.contains("could not be undone"), "{line}");
    let texts: Vec<_> = scope.iter().map(|place| trace.0.spans.lock().unwrap()[*place].text.clone()).collect();
    assert_eq!(texts, [format!("pod.make pod={pod}"), format!("call pod={pod}")]);
    let failed = "
        call pod=P
          pod.make pod=P
            record pod=P
            start_shim pod=P
            prepare pod=P
              isolator isolator=recorder pod=P
            create_sandbox pod=P
            undo pod=P
              isolator isolator=recorder pod=P
            record pod=P
    ";
    assert_eq!(trace.take(&[(pod.as_str(), "P")]), tree(failed));
}

#[tokio::test]
async fn a_caller_who_joins_gets_the_id_and_not_the_work() {
    let (trace, _guard) = Trace::start();
    let bench = Bench::new();
    bench.world.hold("create_sandbox");
    let first = tokio::spawn({
        let (trace, engine) = (trace.clone(), bench.engine.clone());
        async move { trace.call(engine.run_pod(pod_spec("a"))).await.unwrap() }
    });
    bench.world.reached("create_sandbox", 1).await;
    let retry = trace.call(bench.engine.run_pod(pod_spec("a")));
    let open = async {
        bench.world.open("create_sandbox");
    };
    let (pod, ()) = tokio::join!(retry, open);
    let pod = pod.unwrap();
    assert_eq!(first.await.unwrap(), pod);
    assert_eq!(trace.call(bench.engine.run_pod(pod_spec("a"))).await.unwrap(), pod);
    trace.quiet().await;
    let seen = trace.take(&[(pod.as_str(), "P")]);
    assert_eq!(seen.lines().filter(|line| *line == "call pod=P").count(), 3, "{seen}");
    assert_eq!(seen.matches("pod.make").count(), 1, "{seen}");
}

#[test]
fn recovery_is_a_trace_of_its_own() {
    let (trace, _guard) = Trace::start();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let old = Bench::new();
    let (pod, id) = runtime().block_on(async {
        let pod = old.pod("a").await;
        let id = old.running(&pod, "c").await;
        trace.quiet().await;
        (pod, id)
    });
    old.world.exit(&id, 3);
    trace.take(&[]);
    let bench = old.restarted();
    runtime().block_on(async {
        bench.engine.recover().await.unwrap();
        trace.quiet().await;
    });
    let recovered = "
        recover
          load
          sweep
            isolator isolator=recorder
          pod.recover pod=P
            probe pod=P
            container.exit pod=P container=C
              record pod=P container=C
              delete_task pod=P container=C
    ";
    assert_eq!(trace.take(&[(pod.as_str(), "P"), (id.as_str(), "C")]), tree(recovered));
}
