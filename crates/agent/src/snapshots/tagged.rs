//! List of the named snapshots, with what clients see of them.
//!
//! To describe a snapshot, its manifest and the header of its memory are parsed, which takes longer
//! the more memory it has. The list is therefore read once and then changed together with the names:
//! only this process changes them. Of a damaged snapshot only the name is known.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use wrenn_model::{MachineSize, TemplateName};

/// Snapshot with a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TaggedSnapshot {
    pub(crate) name: TemplateName,
    /// `None` if the snapshot is damaged. The other fields are then 0.
    pub(crate) size: Option<MachineSize>,
    pub(crate) created_unix_ms: i64,
    /// Disk space used by this snapshot alone, in bytes.
    pub(crate) size_bytes: u64,
    pub(crate) generation: u64,
}

impl TaggedSnapshot {
    /// Returns what is known of a damaged snapshot.
    pub(super) const fn damaged(name: TemplateName) -> Self {
        Self {
            name,
            size: None,
            created_unix_ms: 0,
            size_bytes: 0,
            generation: 0,
        }
    }
}

type Entries = BTreeMap<TemplateName, Arc<TaggedSnapshot>>;

/// Named snapshots of a store.
#[derive(Debug, Default)]
pub(super) struct TaggedSnapshots {
    /// `None` before the first read.
    entries: Mutex<Option<Entries>>,
}

impl TaggedSnapshots {
    /// Returns all named snapshots, sorted by name. `read` reads them from the store. It is called
    /// until it has succeeded once.
    pub(super) fn all<E>(
        &self,
        read: impl FnOnce() -> Result<Vec<TaggedSnapshot>, E>,
    ) -> Result<Vec<Arc<TaggedSnapshot>>, E> {
        let mut known = self.entries.lock();
        if known.is_none() {
            let all = read()?.into_iter();
            let all = all.map(|tagged| (tagged.name.clone(), Arc::new(tagged)));
            *known = Some(all.collect());
        }
        let entries = known.as_ref().into_iter().flatten();
        Ok(entries.map(|(_, tagged)| Arc::clone(tagged)).collect())
    }

    /// Changes a name in the store by `write`, and then here. `write` returns the new snapshot of the
    /// name, or `None` if the name is gone. No other change and no read happens in between.
    pub(super) fn change<E>(
        &self,
        name: &TemplateName,
        write: impl FnOnce() -> Result<Option<TaggedSnapshot>, E>,
    ) -> Result<Option<TaggedSnapshot>, E> {
        let mut entries = self.entries.lock();
        let new = write()?;
        if let Some(entries) = entries.as_mut() {
            match &new {
                Some(tagged) => entries.insert(name.clone(), Arc::new(tagged.clone())),
                None => entries.remove(name),
            };
        }
        Ok(new)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn tagged(name: &str, size_bytes: u64) -> TaggedSnapshot {
        TaggedSnapshot {
            size_bytes,
            ..TaggedSnapshot::damaged(name.parse().unwrap())
        }
    }

    fn list(tags: &TaggedSnapshots) -> Vec<(String, u64)> {
        let read = || -> Result<_, ()> { panic!("read again") };
        let all = tags.all(read).unwrap();
        let shown = |one: &Arc<TaggedSnapshot>| (one.name.to_string(), one.size_bytes);
        all.iter().map(shown).collect()
    }

    #[test]
    fn store_is_read_once_and_changes_are_followed() {
        let tags = TaggedSnapshots::default();
        let change = |name: &str, new: Option<TaggedSnapshot>| {
            let name = name.parse().unwrap();
            tags.change(&name, || Ok::<_, ()>(new)).unwrap();
        };
        // A change before the first read is found by the read.
        change("early", Some(tagged("early", 1)));
        assert_eq!(tags.all(|| Err("unreadable")), Err("unreadable"));
        let first = tags.all(|| Ok::<_, ()>(vec![tagged("b", 2), tagged("a", 1)]));
        assert_eq!(first.unwrap().len(), 2);
        assert_eq!(list(&tags), [("a".to_owned(), 1), ("b".to_owned(), 2)]);
        change("b", Some(tagged("b", 7)));
        change("c", Some(tagged("c", 3)));
        change("a", None);
        assert_eq!(list(&tags), [("b".to_owned(), 7), ("c".to_owned(), 3)]);
        let name = "b".parse().unwrap();
        assert_eq!(tags.change(&name, || Err(())), Err(()));
        assert_eq!(list(&tags).len(), 2);
    }
}
