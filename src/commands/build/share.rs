//! Which share of a planned build this process does: said by the user, or by the environment of whoever started it.

use caskd_cache_builder::Share;

use crate::exit::Failure;

/// Reads one variable of the environment.
pub(super) type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// A share, and who said so.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) share: Share,
    pub(super) said_by: &'static str,
    /// Others that would have said something, too.
    pub(super) overruled: Vec<&'static str>,
}

/// One that starts many copies of a process: its name, what shows that it did, and how it counts.
type Launcher = (
    &'static str,
    &'static str,
    fn(Environment<'_>) -> Result<Share, Failure>,
);

/// In the order in which they are believed.
const LAUNCHERS: [Launcher; 3] = [
    ("the Slurm array", "SLURM_ARRAY_TASK_ID", of_slurm),
    (
        "the Kubernetes Indexed Job",
        "JOB_COMPLETION_INDEX",
        of_kubernetes,
    ),
    ("torchrun", "WORLD_SIZE", of_torchrun),
];

/// The share that `--worker` names, or that the environment does where it is `auto`.
pub(super) fn resolve(text: &str, environment: Environment<'_>) -> Result<Origin, Failure> {
    if text != "auto" {
        return Ok(Origin {
            share: parse(text)?,
            said_by: "--worker",
            overruled: Vec::new(),
        });
    }
    let mut present = LAUNCHERS
        .into_iter()
        .filter(|(_, sign, _)| environment(sign).is_some());
    let Some((said_by, _, count)) = present.next() else {
        return Err(Failure::user(
            "--worker without a value, but nothing in the environment says which",
            "give --worker I/N, or start it from a Slurm array, a Kubernetes Indexed Job or torchrun",
        ));
    };
    Ok(Origin {
        share: checked(count(environment)?, said_by)?,
        said_by,
        overruled: present.map(|(name, ..)| name).collect(),
    })
}

fn parse(text: &str) -> Result<Share, Failure> {
    let numbers = text
        .split_once('/')
        .and_then(|(index, count)| Some((index.parse().ok()?, count.parse().ok()?)));
    let Some((index, count)) = numbers else {
        return Err(Failure::user(
            format!("--worker `{text}` is no share"),
            "give the worker's number from 0, and how many there are: --worker 0/4",
        ));
    };
    checked(Share { index, count }, "--worker")
}

fn checked(share: Share, said_by: &str) -> Result<Share, Failure> {
    if share.index >= share.count {
        return Err(Failure::user(
            format!(
                "{said_by} says worker {} of {}, but workers are counted from 0",
                share.index, share.count
            ),
            "where only a part of an array runs again, say the shares yourself: --worker I/N",
        ));
    }
    Ok(share)
}

fn number(environment: Environment<'_>, name: &str) -> Result<usize, Failure> {
    let Some(text) = environment(name) else {
        return Err(Failure::user(
            format!("the environment has no {name}"),
            "give --worker I/N instead",
        ));
    };
    text.trim().parse().map_err(|_| {
        Failure::user(
            format!("{name} is `{text}`, which is no number"),
            "give --worker I/N instead",
        )
    })
}

/// An array may begin anywhere and take steps: `--array=1-16`, `--array=0-30:2`.
fn of_slurm(environment: Environment<'_>) -> Result<Share, Failure> {
    let step = match environment("SLURM_ARRAY_TASK_STEP") {
        Some(_) => number(environment, "SLURM_ARRAY_TASK_STEP")?.max(1),
        None => 1,
    };
    let (id, first) = (
        number(environment, "SLURM_ARRAY_TASK_ID")?,
        number(environment, "SLURM_ARRAY_TASK_MIN")?,
    );
    Ok(Share {
        index: id.saturating_sub(first) / step,
        count: number(environment, "SLURM_ARRAY_TASK_COUNT")?,
    })
}

/// Kubernetes tells a pod its index, but not how many there are: the manifest must.
fn of_kubernetes(environment: Environment<'_>) -> Result<Share, Failure> {
    Ok(Share {
        index: number(environment, "JOB_COMPLETION_INDEX")?,
        count: number(environment, "JOB_COMPLETIONS")?,
    })
}

fn of_torchrun(environment: Environment<'_>) -> Result<Share, Failure> {
    Ok(Share {
        index: number(environment, "RANK")?,
        count: number(environment, "WORLD_SIZE")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, variables: &[(&str, &str)], expected: Result<(usize, usize), &str>) {
        let environment = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        match (resolve(text, &environment), expected) {
            (Ok(origin), Ok((index, count))) => {
                assert_eq!(origin.share, Share { index, count }, "{text} {variables:?}");
            }
            (Err(failure), Err(part)) => {
                assert!(failure.to_string().contains(part), "{failure} lacks {part}");
            }
            (found, expected) => panic!("{text} {variables:?}: {found:?}, not {expected:?}"),
        }
    }

    #[test]
    fn a_share_is_read_or_refused() {
        check("2/4", &[], Ok((2, 4)));
        check("0/1", &[("RANK", "7"), ("WORLD_SIZE", "8")], Ok((0, 1)));
        check("4/4", &[], Err("counted from 0"));
        check("0/0", &[], Err("counted from 0"));
        for bad in ["3", "a/b", "1/", "-1/4", "1/4/2", ""] {
            check(bad, &[], Err("is no share"));
        }
    }

    #[test]
    fn the_environment_says_it_in_a_fixed_order() {
        let slurm = [
            ("SLURM_ARRAY_TASK_ID", "7"),
            ("SLURM_ARRAY_TASK_MIN", "1"),
            ("SLURM_ARRAY_TASK_COUNT", "4"),
            ("SLURM_ARRAY_TASK_STEP", "2"),
        ];
        let kubernetes = [("JOB_COMPLETION_INDEX", "5"), ("JOB_COMPLETIONS", "6")];
        let torchrun = [("RANK", "1"), ("WORLD_SIZE", "2")];
        check("auto", &slurm, Ok((3, 4)));
        check("auto", &kubernetes, Ok((5, 6)));
        check("auto", &torchrun, Ok((1, 2)));
        let all = [&slurm[..], &kubernetes, &torchrun].concat();
        check("auto", &all, Ok((3, 4)));
        check("auto", &all[4..], Ok((5, 6)));
        let origin = resolve("auto", &|name| {
            let found = all.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        });
        let origin = origin.unwrap();
        assert_eq!(origin.said_by, "the Slurm array");
        assert_eq!(origin.overruled, ["the Kubernetes Indexed Job", "torchrun"]);
    }

    #[test]
    fn an_environment_that_says_half_is_refused() {
        check("auto", &[], Err("nothing in the environment"));
        check(
            "auto",
            &[("JOB_COMPLETION_INDEX", "0")],
            Err("no JOB_COMPLETIONS"),
        );
        check("auto", &[("RANK", "0")], Err("nothing in the environment"));
        check("auto", &[("WORLD_SIZE", "2")], Err("no RANK"));
        let odd = [("RANK", "one"), ("WORLD_SIZE", "2")];
        check("auto", &odd, Err("no number"));
        // `--array=3,7` again: two tasks, numbered 3 and 7.
        let part = [
            ("SLURM_ARRAY_TASK_ID", "7"),
            ("SLURM_ARRAY_TASK_MIN", "3"),
            ("SLURM_ARRAY_TASK_COUNT", "2"),
        ];
        check("auto", &part, Err("counted from 0"));
    }
}
