//! Suspending. Nothing to set and nothing to count: [`crate::cgroups::Manager::freeze`] uses it. The row says where it lives.

use super::{Row, none};
use crate::cgroups::host::Controller;

pub(super) const FREEZER: Row = Row {
    controller: Controller::Freezer,
    wanted: none::wanted,
    required: false,
    apply_v1: none::apply,
    apply_v2: none::apply,
    stats_v1: none::stats,
    stats_v2: none::stats,
};
