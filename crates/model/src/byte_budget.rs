//! Budget of bytes that the buffers of a process share.
//!
//! The budget counts bytes and allocates none. A buffer reserves its bytes before it grows. If the
//! budget has no room, the buffer is not allocated, or its content is streamed instead.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// Budget. Clones share it.
#[derive(Debug, Clone)]
pub struct ByteBudget(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limit_bytes: usize,
    used_bytes: AtomicUsize,
}

/// Bytes of a budget that a buffer uses. They are returned when this value is dropped.
#[derive(Debug)]
pub struct Reservation {
    budget: ByteBudget,
    bytes: usize,
}

/// Error of a buffer for which the budget has no room now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "bodies of requests and responses use all {limit_bytes} bytes of the buffers; repeat the request later (the limit is `WRENN_MAX_BUFFERED_MIB`)"
)]
pub struct BudgetExhausted {
    /// Size of the budget, in bytes.
    pub limit_bytes: usize,
}

impl ByteBudget {
    /// Creates a budget of this size.
    #[must_use]
    pub fn new(limit_bytes: usize) -> Self {
        Self(Arc::new(Shared {
            limit_bytes,
            used_bytes: AtomicUsize::new(0),
        }))
    }

    /// Creates a budget without a limit.
    #[must_use]
    pub fn unlimited() -> Self {
        Self::new(usize::MAX)
    }

    /// Returns the size of the budget, in bytes.
    #[must_use]
    pub fn limit_bytes(&self) -> usize {
        self.0.limit_bytes
    }

    /// Returns the number of bytes in use.
    #[must_use]
    pub fn used_bytes(&self) -> usize {
        self.0.used_bytes.load(Ordering::Relaxed)
    }

    /// Returns a reservation of no bytes, which can grow.
    #[must_use]
    pub fn empty(&self) -> Reservation {
        Reservation {
            budget: self.clone(),
            bytes: 0,
        }
    }

    /// Reserves bytes.
    ///
    /// # Errors
    /// If fewer bytes are left.
    pub fn reserve(&self, bytes: usize) -> Result<Reservation, BudgetExhausted> {
        let mut reservation = self.empty();
        reservation.grow(bytes)?;
        Ok(reservation)
    }
}

impl Reservation {
    /// Reserves more bytes.
    ///
    /// # Errors
    /// If fewer bytes are left. The reservation is unchanged.
    pub fn grow(&mut self, bytes: usize) -> Result<(), BudgetExhausted> {
        let Shared {
            limit_bytes,
            ref used_bytes,
        } = *self.budget.0;
        let grown = |used: usize| {
            let grown = used.checked_add(bytes)?;
            (grown <= limit_bytes).then_some(grown)
        };
        used_bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, grown)
            .map_err(|_| BudgetExhausted { limit_bytes })?;
        self.bytes += bytes;
        Ok(())
    }

    /// Returns the number of reserved bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget
            .0
            .used_bytes
            .fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_given_up_to_the_limit_and_returned() {
        let budget = ByteBudget::new(10);
        let mut first = budget.reserve(4).expect("room");
        let second = budget.clone().reserve(6).expect("room");
        let error = first.grow(1).expect_err("no room");
        assert!(error.to_string().contains("10 bytes"), "{error}");
        assert_eq!((first.bytes(), budget.used_bytes()), (4, 10));
        drop(second);
        first.grow(1).expect("room");
        assert_eq!(budget.used_bytes(), 5);
        assert!(first.grow(usize::MAX).is_err());
        drop(first);
        assert_eq!(budget.used_bytes(), 0);
        assert!(ByteBudget::unlimited().reserve(1 << 40).is_ok());
    }
}
