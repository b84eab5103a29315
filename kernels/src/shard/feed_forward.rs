//! The feed-forward part of a layer: one for all tokens, or a mixture of experts of which each token takes some.

use super::weights::{same_order, FeedForward, Linear, Mlp, Moe};
use super::{resize, Shard};
use crate::descriptor::{Gating, MoeOptions};
use crate::dispatch::Kernels;
use crate::matmul::{matmul_gated, Activations};
use crate::ops;
use crate::pool::Pool;
use crate::profile::{Profile, Step};

/// What experts need beside the shard's buffers.
#[derive(Default)]
pub(super) struct Buffers {
    /// A score per token and expert.
    scores: Vec<f32>,
    /// Rows of the tokens that go to an expert, and what it makes of them.
    input: Vec<f32>,
    output: Vec<f32>,
}

impl Shard {
    /// `b.delta` = what the feed-forward makes of the `n` rows of `b.norm`; `next` is multiplied next.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn feed_forward(
        &self,
        pool: &Pool,
        ffn: &FeedForward,
        next: Option<&Linear>,
        act: &mut Activations,
        n: usize,
        b: &mut super::Buffers,
        profile: &mut Profile,
    ) {
        let x = &b.norm[..n * self.hyper.embedding];
        match (ffn, &self.hyper.moe) {
            (FeedForward::Mlp(mlp), _) => {
                self.mlp(pool, mlp, next, x, act, n, &mut b.gate, &mut b.up, &mut b.delta, profile)
            }
            (FeedForward::Moe(moe), Some(options)) => self.moe(pool, moe, options, act, n, b, profile),
            (FeedForward::Moe(_), None) => unreachable!("the descriptor was checked"),
        }
    }

    /// `out = down(activation(gate·x) · up·x)` for the `n` rows of `x`; `next` is multiplied next.
    #[allow(clippy::too_many_arguments)]
    fn mlp(
        &self,
        pool: &Pool,
        mlp: &Mlp,
        next: Option<&Linear>,
        x: &[f32],
        act: &mut Activations,
        n: usize,
        gate: &mut Vec<f32>,
        up: &mut Vec<f32>,
        out: &mut Vec<f32>,
        profile: &mut Profile,
    ) {
        let (ks, kind) = (self.ks, self.hyper.activation);
        let ff = mlp.up.w.rows;
        // Without gate, `up` takes its place.
        let (first, second) = mlp.gate.as_ref().map_or((&mlp.up, None), |gate| (gate, Some(&mlp.up)));
        let together = |second: &Linear| same_order([first, second]);
        let forms = [first.w.form, second.filter(|second| together(second)).unwrap_or(first).w.form];
        act.prepare_in_order(ks, x, first.order.as_deref(), n, x.len() / n, &forms, pool);
        profile.end(Step::Quantize);
        let plain = |l: &Linear| l.scale.is_none() && l.bias.is_none();
        if let Some(second) = second.filter(|second| plain(first) && plain(second) && together(second)) {
            resize(gate, n * ff);
            resize(up, n * ff);
            let gated = [first, second].map(|l| (self.plans.plan(&l.w, n), &*l.w));
            let pool = self.pool_for(pool, gated.iter().map(|(_, w)| w.bytes()).sum::<usize>() * n);
            self.expect(pool, Some(&mlp.down));
            let activate = |ks: &Kernels, x: &mut [f32], up: &[f32]| ops::activate(ks, kind, x, Some(up));
            matmul_gated(ks, gated, activate, act, gate, up, pool);
        } else {
            self.linear(pool, first, act, n, gate);
            if let Some(second) = second {
                if !together(second) {
                    self.prepare(pool, second, x, n, act);
                }
                self.linear(pool, second, act, n, up);
            }
            let up = second.map(|_| &up[..n * ff]);
            ops::activate(ks, kind, &mut gate[..n * ff], up);
        }
        profile.end(Step::GateUp);
        self.norm_in_place(pool, mlp.sub_norm.as_ref(), &mut gate[..n * ff], ff);
        self.prepare(pool, &mlp.down, &gate[..n * ff], n, act);
        profile.end(Step::Quantize);
        self.expect(pool, next);
        self.linear(pool, &mlp.down, act, n, out);
        profile.end(Step::Down);
    }

    /// The same of a mixture: every expert computes its tokens together, and a token's shares are added in order of experts,
    /// so that neighbours in the batch do not show.
    #[allow(clippy::too_many_arguments)]
    fn moe(
        &self,
        pool: &Pool,
        moe: &Moe,
        options: &MoeOptions,
        act: &mut Activations,
        n: usize,
        b: &mut super::Buffers,
        profile: &mut Profile,
    ) {
        let (ks, d) = (self.ks, self.hyper.embedding);
        let e = &mut b.experts;
        self.prepare(pool, &moe.router, &b.norm[..n * d], n, act);
        self.linear(pool, &moe.router, act, n, &mut e.scores);
        let chosen = e.scores[..n * options.experts].chunks_exact_mut(options.experts);
        let chosen: Vec<Vec<(usize, f32)>> = chosen.map(|scores| self.choose(scores, options)).collect();

        resize(&mut b.delta, n * d);
        b.delta[..n * d].fill(0.0);
        for (index, expert) in moe.experts.iter().enumerate() {
            let share = |chosen: &[(usize, f32)]| chosen.iter().find(|c| c.0 == index).map(|c| c.1);
            let rows: Vec<(usize, f32)> =
                chosen.iter().enumerate().filter_map(|(i, chosen)| Some((i, share(chosen)?))).collect();
            if rows.is_empty() {
                continue;
            }
            e.input.clear();
            rows.iter().for_each(|&(i, _)| e.input.extend_from_slice(&b.norm[i * d..(i + 1) * d]));
            self.mlp(pool, expert, None, &e.input, act, rows.len(), &mut b.gate, &mut b.up, &mut e.output, profile);
            for (&(i, share), output) in rows.iter().zip(e.output.chunks_exact(d)) {
                ops::axpy(ks, &mut b.delta[i * d..(i + 1) * d], share, output);
            }
        }
        let Some(shared) = &moe.shared else { return };
        let shares = moe.shared_gate.as_ref().map(|gate| self.shares(pool, gate, act, n, &b.norm[..n * d]));
        self.mlp(pool, shared, None, &b.norm[..n * d], act, n, &mut b.gate, &mut b.up, &mut e.output, profile);
        for (i, (delta, output)) in b.delta.chunks_exact_mut(d).zip(e.output.chunks_exact(d)).take(n).enumerate() {
            ops::axpy(ks, delta, shares.as_ref().map_or(1.0, |shares| shares[i]), output);
        }
    }

    /// The experts of a token, with their weights; of equal scores the first counts more.
    fn choose(&self, scores: &mut [f32], options: &MoeOptions) -> Vec<(usize, f32)> {
        let ks = self.ks;
        match options.gating {
            Gating::Softmax => ops::softmax(ks, scores),
            Gating::Sigmoid => sigmoid(self, scores),
        }
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        order.truncate(options.used);
        let sum: f32 = order.iter().map(|&i| scores[i]).sum();
        let scale = options.scale.unwrap_or(1.0) / if options.normalise { sum } else { 1.0 };
        order.into_iter().map(|i| (i, scores[i] * scale)).collect()
    }

    /// How much of the shared expert each row takes.
    fn shares(&self, pool: &Pool, gate: &Linear, act: &mut Activations, n: usize, x: &[f32]) -> Vec<f32> {
        let mut shares = Vec::new();
        self.prepare(pool, gate, x, n, act);
        self.linear(pool, gate, act, n, &mut shares);
        sigmoid(self, &mut shares[..n]);
        shares
    }
}

/// x = 1 / (1 + e^−x)
fn sigmoid(shard: &Shard, x: &mut [f32]) {
    x.iter_mut().for_each(|x| *x = -*x);
    ops::exp(shard.ks, x, 0.0);
    x.iter_mut().for_each(|x| *x = 1.0 / (1.0 + *x));
}
