//! Domain types that all parts of Wrenn share: identifiers, sizes, status and limits. Contains no
//! I/O, and knows no wire format but its own serialization.
//!
//! - [`SandboxId`], [`TemplateName`]: identifiers that are validated when they are parsed, so that
//!   they are safe in paths and in names of kernel objects.
//! - [`MachineSize`]: virtual CPUs, memory and disk of a sandbox.
//! - [`SandboxStatus`], [`OnTimeout`], [`Egress`], [`BootTimes`], [`CpuModel`]: properties of a
//!   sandbox.
//! - [`Boundary`]: what separates a guest from its host.
//! - [`TeamId`], [`Scope`]: owners of sandboxes, and what an API key may do.
//! - [`ByteBudget`]: account of the bytes that buffers share.
//! - [`limits`]: sizes and ranges, with their units.

mod boot_times;
mod byte_budget;
mod cpu_model;
mod egress;
mod ids;
mod isolation;
pub mod limits;
mod machine_size;
mod status;
mod team;

pub use boot_times::BootTimes;
pub use byte_budget::{BudgetExhausted, ByteBudget, Reservation};
pub use cpu_model::{CpuModel, InvalidCpuModel};
pub use egress::{Egress, EgressLimit};
pub use ids::{InvalidId, SandboxId, TemplateName};
pub use isolation::{Boundary, EMULATION_NOTE};
pub use machine_size::MachineSize;
pub use status::{OnTimeout, SandboxStatus};
pub use team::{Scope, Scopes, TeamId};
