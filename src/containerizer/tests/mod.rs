//! Tests of the containerizer against fakes of everything below it.
