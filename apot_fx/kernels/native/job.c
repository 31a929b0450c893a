#include "job.h"

#include <stdlib.h>

/* The longest step of any ISA, by which arrays along the channels are longer. */
#define PADDING 64

int64_t apot_values_of(const apot_layout *l) {
  if (!l->row) return l->outer * l->channels * l->inner;
  return l->channels / ((l->row + l->inner - 1) / l->inner) * l->row;
}

apot_clip apot_clip_of(float alpha, const apot_set *set) {
  apot_clip made;
  made.alpha = apot_clamped(alpha);
  made.scale = (float)(2 * set->unit) / made.alpha;
  made.step = made.alpha / (float)set->unit;
  return made;
}

apot_span apot_part_of(const apot_job *j, int64_t at, int64_t count) {
  apot_span s = j->span;
  int64_t row = j->gaps.row;
  s.x = apot_from(s.x, row ? at / row * j->gaps.stride + at % row : at, j->in);
  s.grad = apot_from(s.grad, at, j->in);
  s.out = (char *)s.out + (size_t)at * j->out;
  s.count = count;
  return s;
}

void apot_use_clip(apot_span *s, const apot_clip *c) {
  s->scale = &c->scale;
  s->step = &c->step;
  s->alpha = &c->alpha;
  s->careful = c->alpha != c->alpha;
}

int apot_make_clips(apot_job *j) {
  int64_t padded = j->l.channels + PADDING;
  j->clips = calloc(3 * (size_t)padded, sizeof(float));
  if (!j->clips) return 0;
  for (int64_t channel = 0; channel < j->l.channels; channel++) {
    apot_clip own = apot_clip_of(j->alpha[channel], j->span.set);
    j->careful |= own.alpha != own.alpha;
    j->clips[channel] = own.scale;
    j->clips[channel + padded] = own.step;
    j->clips[channel + 2 * padded] = own.alpha;
  }
  return 1;
}

void apot_use_clips(apot_span *s, const apot_job *j, int64_t channel) {
  int64_t padded = j->l.channels + PADDING;
  s->varies = 1;
  s->careful = j->careful;
  s->scale = j->clips + channel;
  s->step = s->scale + padded;
  s->alpha = s->step + padded;
}
