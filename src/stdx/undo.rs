//! Undo stack: every acquired thing pushes its undo, with a name, at once. On failure the undos run in reverse, all of
//! them, and all their errors come back.

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
        let mut failures = Vec::new();
        while let Some((name, step)) = self.steps.pop() {
            if let Err(e) = step().await {
                failures.push(format!("{name}: {e}"));
            }
        }
        failures
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
}
