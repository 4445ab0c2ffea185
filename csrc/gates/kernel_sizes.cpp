// Prints threads, dynamic shared memory and blocks an SM of every kernel as "name threads bytes
// blocks", from the same functions that the launches use. Blocks are those of an SM of sm_90 in the
// case that the kernel is for: up to 64 tokens the projection has fewer blocks than the device SMs.
#include <cstdio>
#include <initializer_list>

#include "../cuda/heuristics.h"

namespace {

void print(const char* kernel, const char* parameters, int threads, int bytes, int blocks) {
  for (const char* element : {"Bf16", "Fp16"}) {
    std::printf("%s<%s,%s> %d %d %d\n", kernel, element, parameters, threads, bytes, blocks);
  }
}

template <int kHeadDim, int kTokens>
void print_kv_project() {
  using Shape = dflare::KvProjectShape<kHeadDim, kTokens>;
  char parameters[32];
  std::snprintf(parameters, sizeof(parameters), "%d,%d", kHeadDim, kTokens);
  print("kv_project_write_kernel", parameters, Shape::kThreads, Shape::kSharedBytes,
        kTokens > 64 ? 2 : 1);
}

// Alone on an SM.
template <int kHeadDim, int kTokens>
void print_kv_project_wgmma() {
  using Shape = dflare::KvProjectWgmmaShape<kHeadDim, kTokens>;
  char parameters[32];
  std::snprintf(parameters, sizeof(parameters), "%d,%d", kHeadDim, kTokens);
  print("kv_project_wgmma_kernel", parameters, Shape::kThreads, Shape::kSharedBytes, 1);
}

void print_attention(int head_dim, int warps) {
  char parameters[32];
  std::snprintf(parameters, sizeof(parameters), "%d,%d", head_dim, warps);
  print("block_attention_kernel", parameters, 32 * warps,
        dflare::attention_shared_bytes(head_dim, warps),
        dflare::attention_blocks_per_sm(head_dim, warps));
}

}  // namespace

int main() {
  print("fuse_norm_kernel", "4,1024,1", 1024, dflare::fuse_norm_shared_bytes(4, 1024), 1);
  print("fuse_norm_kernel", "8,512,1", 512, dflare::fuse_norm_shared_bytes(8, 512), 1);
  print("fuse_norm_kernel", "8,320,2", 320, dflare::fuse_norm_shared_bytes(8, 320), 2);
  print_kv_project<64, 16>();
  print_kv_project<64, 64>();
  print_kv_project<64, 128>();
  print_kv_project<128, 16>();
  print_kv_project<128, 64>();
  print_kv_project<128, 128>();
  print_kv_project<256, 16>();
  print_kv_project<256, 64>();
  print_kv_project_wgmma<64, 16>();
  print_kv_project_wgmma<64, 64>();
  print_kv_project_wgmma<64, 256>();
  print_kv_project_wgmma<128, 16>();
  print_kv_project_wgmma<128, 64>();
  print_kv_project_wgmma<128, 256>();
  print_kv_project_wgmma<256, 16>();
  print_kv_project_wgmma<256, 64>();
  print_kv_project_wgmma<256, 128>();
  for (const char* head_dim : {"64", "128", "256"}) {
    print("norm_rope_write_kernel", head_dim, 256, 0, 1);
  }
  print_attention(64, 4);
  print_attention(64, 8);
  print_attention(128, 4);
  print_attention(128, 8);
  print_attention(256, 4);
  print("block_attention_wgmma_kernel", "128,8", 256, dflare::kAttentionWgmmaSharedBytes, 1);
  std::printf("block_attention_schedule_kernel 32 0 1\n");
  for (const char* element : {"Bf16", "Fp16"}) {
    std::printf("head_argmax_kernel<%s> %d %d 1\n", element, dflare::kHeadThreads,
                dflare::kHeadSharedBytes);
  }
  std::printf("lookup_continuations_kernel %d %d 1\n", dflare::kLookupThreads,
              dflare::lookup_shared_bytes(dflare::kLookupMatch));
  std::printf("build_draft_tree_kernel %d %d 1\n", dflare::kTreeThreads,
              dflare::build_tree_shared_bytes(dflare::kMaxTreeWidth - 1));
  std::printf("walk_draft_tree_kernel %d 0 1\n", dflare::kTreeThreads);
  std::printf("write_tree_mask_kernel %d 0 1\n", dflare::kTreeThreads);
}
