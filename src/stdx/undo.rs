//! Undo stack: every acquired thing pushes its undo, with a name, at once. On failure the undos run in reverse, all of
//! them, and all their errors come back.
//!
//! A stack that is dropped with undos in it (a panic half-way) runs them on the current runtime and says so in the log.

use std::future::Future;
use std::pin::Pin;

type Step = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> + Send>;

/// What has been acquired so far and how to give it back.
#[derive(Default)]
pub struct Undo {
    steps: Vec<(&'static str, Step)>,
}

impl Undo {
    /// Remembers how to undo `name`. Errors are given as text: they end in one combined message.
    pub fn push<F, Fut>(&mut self, name: &'static str, undo: F)
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = Result<(), String>> + Send + 'static,
    {
        self.steps.push((name, Box::new(move || Box::pin(undo()))));
    }

    /// Everything worked: forget the undos.
    pub fn commit(mut self) {
        self.steps.clear();
    }

    /// Undoes everything in reverse order, goes on past failures, returns them as `name: error`.
    pub async fn run(mut self) -> Vec<String> {
        run(std::mem::take(&mut self.steps)).await
    }
}

async fn run(mut steps: Vec<(&'static str, Step)>) -> Vec<String> {
    let mut failures = Vec::new();
    while let Some((name, step)) = steps.pop() {
        if let Err(e) = step().await {
            failures.push(format!("{name}: {e}"));
        }
    }
    failures
}

impl Drop for Undo {
    fn drop(&mut self) {
        let steps = std::mem::take(&mut self.steps);
        if steps.is_empty() {
            return;
        }
        let names: Vec<_> = steps.iter().map(|(name, _)| *name).collect();
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => {
                tracing::error!(?names, "undo stack was dropped half-way, undoing in the background");
                runtime.spawn(async move {
                    for failure in run(steps).await {
                        tracing::error!(failure, "undo failed");
                    }
                });
            }
            Err(_) => tracing::error!(?names, "undo stack was dropped outside a runtime, the next start cleans up"),
        }
    }
}

#[cfg(all(test, feature = "daemon"))]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[tokio::test]
    async fn runs_in_reverse_and_goes_on_past_failures() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let mut undo = Undo::default();
        for name in ["a", "b", "c"] {
            let seen = seen.clone();
            undo.push(name, move || async move {
                seen.lock().unwrap().push(name);
                if name == "b" { Err("no".to_owned()) } else { Ok(()) }
            });
        }
        assert_eq!(undo.run().await, vec!["b: no"]);
        assert_eq!(*seen.lock().unwrap(), vec!["c", "b", "a"]);
    }

    #[tokio::test]
    async fn a_dropped_stack_still_undoes_and_a_committed_one_does_not() {
        let (sent, mut seen) = tokio::sync::mpsc::unbounded_channel();
        for name in ["dropped", "committed"] {
            let mut undo = Undo::default();
            let sent = sent.clone();
            undo.push(name, move || async move { sent.send(name).map_err(|e| e.to_string()) });
            if name == "committed" {
                undo.commit();
            }
        }
        drop(sent);
        assert_eq!(seen.recv().await, Some("dropped"));
        assert_eq!(seen.recv().await, None);
    }
}
