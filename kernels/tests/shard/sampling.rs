//! Sampling against a plain reference, and the distribution of what is drawn.

use super::model::{Random, GREEDY};
use lutra_kernels::batch::SampleParameters;
use lutra_kernels::sampling::{sample, uniform};
use lutra_kernels::{available, select};

fn draw(logits: &[f32], p: &SampleParameters, history: &[u32]) -> u32 {
    sample(select(None).unwrap(), &mut logits.to_vec(), p, history).unwrap().token.id
}

/// Probabilities of all tokens by the definition, with a full sort, in f64.
fn reference(logits: &[f32], p: &SampleParameters, history: &[u32]) -> Vec<f64> {
    let mut l: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
    for &(id, bias) in &p.bias {
        l[id as usize] += f64::from(bias);
    }
    let first = if p.penalty_last_n < 0 { 0 } else { history.len().saturating_sub(p.penalty_last_n as usize) };
    for (id, l) in l.iter_mut().enumerate() {
        let at: Vec<usize> = (first..history.len()).filter(|&pos| history[pos] as usize == id).collect();
        if !at.is_empty() {
            let repeat = f64::from(p.repeat_penalty);
            *l = if *l > 0.0 { *l / repeat } else { *l * repeat };
        }
        let generated = at.iter().filter(|&&pos| pos >= p.prompt_len as usize).count();
        if generated > 0 {
            *l -= f64::from(p.presence_penalty) + f64::from(p.frequency_penalty) * generated as f64;
        }
    }
    let mut order: Vec<usize> = (0..l.len()).collect();
    order.sort_by(|&a, &b| l[b].total_cmp(&l[a]).then(a.cmp(&b)));
    if p.temperature == 0.0 {
        let mut result = vec![0.0; l.len()];
        result[order[0]] = 1.0;
        return result;
    }
    if p.top_k > 0 {
        order.truncate(p.top_k as usize);
    }
    let best = l[order[0]];
    let weight = |id: usize| ((l[id] - best) / f64::from(p.temperature)).exp();
    if p.top_p < 1.0 {
        let all: f64 = order.iter().map(|&id| weight(id)).sum();
        let mut sum = 0.0;
        let mut kept = 0;
        while kept == 0 || (kept < order.len() && sum < f64::from(p.top_p) * all) {
            sum += weight(order[kept]);
            kept += 1;
        }
        order.truncate(kept);
    }
    let keep = order.iter().take_while(|&&id| weight(id) >= f64::from(p.min_p.min(1.0))).count();
    order.truncate(keep.max(1));
    let sum: f64 = order.iter().map(|&id| weight(id)).sum();
    let mut result = vec![0.0; l.len()];
    for id in order {
        result[id] = weight(id) / sum;
    }
    result
}

fn normal(random: &mut Random) -> f32 {
    (0..12).map(|_| (random.word() >> 40) as f32 / (1 << 24) as f32).sum::<f32>() - 6.0
}

/// Pearson's statistic of drawn tokens, and the tokens with expectation ≥ 5 it is over.
fn chi_square(probabilities: &[f64], counts: &[u32]) -> (f64, usize) {
    let draws = f64::from(counts.iter().sum::<u32>());
    let (mut statistic, mut cells, mut rest) = (0.0, 0, (0.0, 0.0));
    for (&p, &count) in probabilities.iter().zip(counts) {
        if p * draws >= 5.0 {
            statistic += (f64::from(count) - p * draws).powi(2) / (p * draws);
            cells += 1;
        } else {
            rest = (rest.0 + p * draws, rest.1 + f64::from(count));
        }
    }
    if rest.0 >= 5.0 {
        statistic += (rest.1 - rest.0).powi(2) / rest.0;
        cells += 1;
    }
    (statistic, cells)
}

#[test]
fn what_is_drawn_has_the_reference_distribution() {
    let mut random = Random(1);
    let cases = [
        SampleParameters { temperature: 1.0, ..GREEDY },
        SampleParameters { temperature: 0.7, top_k: 5, ..GREEDY },
        SampleParameters { temperature: 1.3, top_p: 0.8, ..GREEDY },
        SampleParameters { temperature: 1.0, min_p: 0.2, ..GREEDY },
        SampleParameters { temperature: 2.0, top_k: 30, top_p: 0.9, min_p: 0.05, ..GREEDY },
        SampleParameters { temperature: 1.0, top_k: 1, ..GREEDY },
        SampleParameters { temperature: 1.0, top_p: 0.0, ..GREEDY },
        SampleParameters { temperature: 1.0, min_p: 2.0, ..GREEDY },
        SampleParameters { temperature: 1e-30, ..GREEDY },
        SampleParameters { temperature: 1e30, ..GREEDY },
        SampleParameters {
            temperature: 0.9,
            top_p: 0.99,
            repeat_penalty: 1.3,
            presence_penalty: 0.5,
            frequency_penalty: -0.3,
            penalty_last_n: 9,
            prompt_len: 6,
            bias: vec![(3, 1.5), (4, -100.0), (3, 0.5)],
            ..GREEDY
        },
    ];
    let history = [3, 9, 9, 1, 2, 30, 7, 3, 3, 5, 0, 0];
    for (case, p) in cases.iter().enumerate() {
        for vocab in [40, 700] {
            let logits: Vec<f32> = (0..vocab).map(|_| 2.0 * normal(&mut random)).collect();
            let probabilities = reference(&logits, p, &history);
            let mut counts = vec![0; vocab];
            for seed in 0..4000 {
                let id = draw(&logits, &SampleParameters { seed, ..p.clone() }, &history);
                assert!(probabilities[id as usize] > 0.0, "case {case}: token {id} is impossible");
                counts[id as usize] += 1;
            }
            let (statistic, cells) = chi_square(&probabilities, &counts);
            // Mean and deviation of χ² are f and √(2f): five deviations, with seeds fixed.
            let freedom = cells.max(2) as f64 - 1.0;
            assert!(
                statistic <= freedom + 5.0 * (2.0 * freedom).sqrt(),
                "case {case}: χ² {statistic} of {cells} cells"
            );
        }
    }
}

#[test]
fn ties_go_to_the_lowest_id() {
    let mut logits = vec![0.0; 1000];
    logits[0] = -0.0;
    assert_eq!(draw(&logits, &GREEDY, &[]), 0);
    logits[500] = 1.0;
    logits[700] = 1.0;
    assert_eq!(draw(&logits, &GREEDY, &[]), 500);
    // Wherever they lie in what is compared at once, and behind it.
    for (first, second) in (0..133).flat_map(|first| (first..133).map(move |second| (first, second))) {
        let mut logits = vec![f32::NEG_INFINITY; 133];
        (logits[first], logits[second]) = (-3.0, -3.0);
        assert_eq!(draw(&logits, &GREEDY, &[]), first as u32, "{second}");
    }
    let p = SampleParameters { temperature: 1.0, top_k: 1, ..GREEDY };
    assert!((0..50).all(|seed| draw(&logits, &SampleParameters { seed, ..p.clone() }, &[]) == 500));
    let p = SampleParameters { top: Some(20), ..GREEDY };
    let top = sample(select(None).unwrap(), &mut logits, &p, &[]).unwrap().top;
    let ids: Vec<u32> = top.iter().map(|t| t.id).collect();
    assert_eq!(ids, [500, 700].into_iter().chain(0..18).collect::<Vec<_>>());
}

#[test]
fn log_probabilities_are_of_raw_logits() {
    let mut random = Random(5);
    for vocab in [1, 2, 7, 19, 20, 21, 300, 5000] {
        let logits: Vec<f32> = (0..vocab).map(|_| 4.0 * normal(&mut random)).collect();
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        let z = f64::from(max) + logits.iter().map(|&l| f64::from(l - max).exp()).sum::<f64>().ln();
        let mut order: Vec<usize> = (0..vocab).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let p = SampleParameters { top: Some(20), bias: vec![(0, 1000.0)], temperature: 0.5, ..GREEDY };
        let mut seen: Option<(u32, u32)> = None;
        for ks in available() {
            let sampled = sample(ks, &mut logits.clone(), &p, &[0, 0]).unwrap();
            assert_eq!(sampled.token.id, 0);
            assert!((f64::from(sampled.token.logprob) - (f64::from(logits[0]) - z)).abs() < 1e-4);
            assert_eq!(sampled.top.len(), vocab.min(20));
            for (t, &id) in sampled.top.iter().zip(&order) {
                assert_eq!(t.id as usize, id);
                assert!((f64::from(t.logprob) - (f64::from(logits[id]) - z)).abs() < 1e-4);
            }
            let bits = (sampled.token.logprob.to_bits(), sampled.top[0].logprob.to_bits());
            assert_eq!(*seen.get_or_insert(bits), bits, "{}", ks.isa);
        }
    }
}

#[test]
fn a_large_vocabulary_is_searched_not_sorted_with_the_same_result() {
    let mut random = Random(6);
    let logits: Vec<f32> = (0..150_000).map(|_| normal(&mut random)).collect();
    // A nucleus wider than the first guess, and top-k beyond it.
    for p in [
        SampleParameters { temperature: 1.0, top_p: 0.9, ..GREEDY },
        SampleParameters { temperature: 0.3, top_p: 0.5, ..GREEDY },
        SampleParameters { temperature: 1.0, top_k: 5000, min_p: 0.1, ..GREEDY },
        SampleParameters { temperature: 1.0, top_k: 200_000, ..GREEDY },
    ] {
        let probabilities = reference(&logits, &p, &[]);
        for seed in 0..20 {
            assert!(probabilities[draw(&logits, &SampleParameters { seed, ..p.clone() }, &[]) as usize] > 0.0);
        }
    }
}

#[test]
fn extremes_give_a_token_or_an_error() {
    let ks = select(None).unwrap();
    let p = SampleParameters { temperature: 1.0, top: Some(3), ..GREEDY };
    for bad in [
        vec![f32::NAN; 5],
        vec![0.0, f32::NAN],
        vec![0.0, f32::INFINITY],
        vec![f32::NEG_INFINITY; 3],
        vec![-f32::NAN, 0.0, f32::NEG_INFINITY],
    ] {
        for p in [&p, &GREEDY] {
            assert!(sample(ks, &mut bad.clone(), p, &[]).is_err(), "{bad:?}");
        }
    }
    let mut random = Random(8);
    let extreme = |random: &mut Random| {
        [0.0, -0.0, 1.0, -1.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45, 1e30, -1e30, 0.5][random.below(11)]
    };
    for seed in 0..20_000 {
        let vocab = 1 + random.below(12);
        let mut logits: Vec<f32> = (0..vocab).map(|_| extreme(&mut random)).collect();
        if random.below(3) == 0 {
            logits[random.below(vocab)] = f32::NEG_INFINITY;
        }
        if logits.iter().all(|l| *l == f32::NEG_INFINITY) {
            continue;
        }
        let p = SampleParameters {
            temperature: extreme(&mut random).abs(),
            top_k: random.below(15) as u32,
            top_p: extreme(&mut random),
            min_p: extreme(&mut random),
            repeat_penalty: extreme(&mut random).abs().max(1e-45),
            presence_penalty: extreme(&mut random),
            frequency_penalty: extreme(&mut random),
            penalty_last_n: random.below(9) as i32 - 1,
            prompt_len: random.below(9) as u32,
            seed,
            top: [None, Some(0), Some(20)][random.below(3)],
            bias: (0..random.below(4)).map(|_| (random.below(vocab) as u32, extreme(&mut random))).collect(),
        };
        let history = random.tokens(8, vocab);
        let sampled = sample(ks, &mut logits.clone(), &p, &history).unwrap();
        assert!((sampled.token.id as usize) < vocab);
        assert_eq!(sampled.top.len(), vocab.min(p.top.unwrap_or(0) as usize));
    }
}

#[test]
fn random_numbers_are_of_seed_and_position_and_even() {
    assert_eq!(uniform(1, 2), uniform(1, 2));
    let mut cells = [0u32; 64];
    for seed in 0..64 {
        for position in 0..1000 {
            let u = uniform(seed, position);
            assert!((0.0..1.0).contains(&u));
            cells[(u * 64.0) as usize] += 1;
        }
    }
    let (statistic, cells) = chi_square(&[1.0 / 64.0; 64], &cells);
    assert!(statistic < cells as f64 + 5.0 * (2.0 * cells as f64).sqrt(), "χ² {statistic}");
}
