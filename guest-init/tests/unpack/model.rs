//! Random layers against a model: a map that the rules of layer.md are written for once more, in the plainest way.

use std::{collections::BTreeMap, fs};

use proptest::prelude::*;

use crate::{
    snapshot,
    tarball::{Item, dir, file, hard_link, symlink, tar},
    unpacked::Unpacked,
};

#[derive(Clone, Debug)]
enum Step {
    File(String, u8),
    Dir(String, u32),
    Symlink(String),
    HardLink(String, String),
    Whiteout(String),
    Opaque(String),
}

/// What the model says is at a path: its kind and content. Which layer made it decides what whiteouts hide.
#[derive(Clone, Debug, PartialEq)]
struct Thing {
    what: What,
    layer: usize,
}

#[derive(Clone, Debug, PartialEq)]
enum What {
    File(u8),
    Dir(u32),
    Symlink,
}

type Model = BTreeMap<String, Thing>;

fn parent(path: &str) -> Option<&str> {
    path.rsplit_once('/').map(|(above, _)| above)
}

fn is_below(path: &str, above: &str) -> bool {
    above.is_empty() || path.strip_prefix(above).is_some_and(|rest| rest.starts_with('/'))
}

fn remove(model: &mut Model, path: &str) {
    model.retain(|known, _| known != path && !is_below(known, path));
}

/// Removes what lower layers have at (`with_itself`) and below a path, but not the way to what this one has made.
fn remove_lower(model: &mut Model, path: &str, with_itself: bool, layer: usize) {
    let made: Vec<String> =
        model.iter().filter(|(_, thing)| thing.layer == layer).map(|(path, _)| path.clone()).collect();
    model.retain(|known, thing| {
        let is_meant = is_below(known, path) || (with_itself && known == path);
        let leads_to_made =
            matches!(thing.what, What::Dir(_)) && made.iter().any(|made| is_below(made, known));
        !is_meant || thing.layer == layer || leads_to_made
    });
}

/// Whether all directories on the way are (or can become) directories.
fn make_parents(model: &mut Model, path: &str, layer: usize) -> bool {
    let Some(above) = parent(path) else { return true };
    if !make_parents(model, above, layer) {
        return false;
    }
    let missing = Thing { what: What::Dir(0o755), layer };
    matches!(model.entry(above.to_owned()).or_insert(missing).what, What::Dir(_))
}

/// Applies a step; `false` if an archive with it must be refused, and then nothing is changed.
fn apply(model: &mut Model, step: &Step, layer: usize) -> bool {
    let before = model.clone();
    let done = match step {
        Step::File(path, content) => {
            make_parents(model, path, layer) && {
                remove(model, path);
                model.insert(path.clone(), Thing { what: What::File(*content), layer });
                true
            }
        }
        Step::Symlink(path) => {
            make_parents(model, path, layer) && {
                remove(model, path);
                model.insert(path.clone(), Thing { what: What::Symlink, layer });
                true
            }
        }
        Step::Dir(path, mode) => {
            make_parents(model, path, layer) && {
                if !matches!(model.get(path), Some(Thing { what: What::Dir(_), .. })) {
                    remove(model, path);
                }
                model.insert(path.clone(), Thing { what: What::Dir(*mode), layer });
                true
            }
        }
        Step::HardLink(path, target) => {
            make_parents(model, path, layer) && {
                match model.get(target).cloned() {
                    None | Some(Thing { what: What::Dir(_), .. }) => false,
                    Some(_) if is_below(target, path) => false,
                    Some(thing) => {
                        if path != target {
                            remove(model, path);
                        }
                        model.insert(path.clone(), Thing { what: thing.what, layer });
                        true
                    }
                }
            }
        }
        // What is not there cannot be hidden, whatever the reason.
        Step::Whiteout(path) => {
            if parent(path).is_none_or(|above| is_directory(model, above)) {
                remove_lower(model, path, true, layer);
            }
            true
        }
        Step::Opaque(path) => {
            if path.is_empty() || is_directory(model, path) {
                remove_lower(model, path, false, layer);
            }
            true
        }
    };
    if !done {
        *model = before;
    }
    done
}

fn is_directory(model: &Model, path: &str) -> bool {
    matches!(model.get(path), Some(Thing { what: What::Dir(_), .. }))
}

fn item(step: &Step) -> Item {
    match step {
        Step::File(path, content) => file(path, [*content]),
        Step::Dir(path, mode) => dir(path).mode(*mode),
        // Nothing of the model's is there, so that it need not know links to directories.
        Step::Symlink(path) => symlink(path, "/proc/nothing/here"),
        Step::HardLink(path, target) => hard_link(path, target),
        Step::Whiteout(path) => match path.rsplit_once('/') {
            Some((above, name)) => file(format!("{above}/.wh.{name}"), ""),
            None => file(format!(".wh.{path}"), ""),
        },
        Step::Opaque(path) => file(format!("{path}/.wh..wh..opq"), ""),
    }
}

fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec("[abc]", 1..4).prop_map(|parts| parts.join("/"))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (path(), any::<u8>()).prop_map(|(path, content)| Step::File(path, content)),
        3 => (path(), prop_oneof![Just(0o755u32), Just(0o700), Just(0o1777)]).prop_map(|(path, mode)| Step::Dir(path, mode)),
        1 => path().prop_map(Step::Symlink),
        2 => (path(), path()).prop_map(|(path, target)| Step::HardLink(path, target)),
        2 => path().prop_map(Step::Whiteout),
        1 => prop_oneof![path(), Just(String::new())].prop_map(Step::Opaque),
    ]
}

fn expected(model: &Model) -> Vec<(String, String)> {
    model.iter().map(|(path, thing)| (path.clone(), format!("{:?}", thing.what))).collect()
}

fn found(image: &Unpacked) -> Vec<(String, String)> {
    let nodes = snapshot::take(&image.root());
    let ours = nodes.into_iter().filter(|(path, _)| path.starts_with(['a', 'b', 'c']));
    ours.map(|(path, node)| {
        let what = match node.kind {
            "file" => What::File(node.content[0]),
            "directory" => What::Dir(node.mode),
            "symlink" => What::Symlink,
            other => panic!("{path} is a {other}"),
        };
        (path, format!("{what:?}"))
    })
    .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn layers_give_the_tree_that_the_model_says(
        layers in proptest::collection::vec(proptest::collection::vec(step(), 0..12), 1..5)
    ) {
        let mut model = Model::new();
        let mut tars = Vec::new();
        for (index, steps) in layers.iter().enumerate() {
            // Steps that must be refused are tested by themselves, below.
            let mut good = Vec::new();
            for step in steps {
                if !matches!(step, Step::Symlink(_)) && crosses_symlink(&model, step) {
                    continue;
                }
                if apply(&mut model, step, index) {
                    good.push(item(step));
                }
            }
            tars.push(tar(&good));
        }
        let image = Unpacked::empty();
        image.unpack_tars(&tars).unwrap();
        prop_assert_eq!(found(&image), expected(&model));
        image.assert_outside_untouched();
    }

    #[test]
    fn what_the_model_refuses_is_refused(steps in proptest::collection::vec(step(), 1..12)) {
        let mut model = Model::new();
        let mut items = Vec::new();
        for step in &steps {
            if crosses_symlink(&model, step) {
                continue;
            }
            items.push(item(step));
            if !apply(&mut model, step, 0) {
                let image = Unpacked::empty();
                prop_assert!(image.unpack_tars(&[tar(&items)]).is_err(), "{:?} was accepted", step);
                fs::metadata(image.root()).unwrap();
                return Ok(());
            }
        }
    }
}

/// Whether a link is on the way to a step's path: where it leads is another test's question.
fn crosses_symlink(model: &Model, step: &Step) -> bool {
    let paths = match step {
        Step::File(path, _) | Step::Dir(path, _) | Step::Symlink(path) | Step::Whiteout(path) => {
            vec![path.clone()]
        }
        Step::HardLink(path, target) => vec![path.clone(), target.clone()],
        Step::Opaque(path) => vec![format!("{path}/x")],
    };
    let is_link = |path: &str| model.get(path).is_some_and(|thing| thing.what == What::Symlink);
    paths.iter().any(|path| {
        let mut above = parent(path);
        while let Some(path) = above {
            if is_link(path) {
                return true;
            }
            above = parent(path);
        }
        false
    })
}
