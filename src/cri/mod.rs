//! F7: the Kubernetes CRI v1 front. Validates, converts, calls the containerizer, converts back; holds no state of its own.
