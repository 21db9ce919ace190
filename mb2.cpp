#include <cstdint>
#include <cstring>
#include <cmath>
#include <cstdio>
#include <algorithm>
#include <type_traits>
#include <vector>
#include <ctime>
namespace at{ struct BFloat16{ uint16_t x; struct from_bits_t{}; static constexpr from_bits_t from_bits(){return {};} BFloat16()=default; constexpr BFloat16(uint16_t b,from_bits_t):x(b){} 
 inline operator float() const { uint32_t t=x; t<<=16; float f; memcpy(&f,&t,4); return f;} }; }
namespace {
#include "body.inc"
#define TGT __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"),noinline))
using b=at::BFloat16;
TGT void m(const b*x,int64_t n,int64_t k,const float*p,float*s){sum_moments(x,n,k,p,s);}
TGT void w(const b*x,b*y,int64_t n,int64_t k,float*p){write_output<true>(x,y,n,k,p);}
TGT void g(const b*d,const b*x,int64_t n,int64_t k,float*p,float*s){sum_gradients<true>(d,x,n,k,p,s);}
TGT void dd(const b*d,const b*x,b*o,int64_t n,int64_t k,float*p){write_gradient<true>(d,x,o,n,k,p);}
TGT void gs(const b* dy, const b* x, float* G, int64_t n, int64_t block, float* parameters, float* sums) {
  const Parameters<float> p(parameters, block);
  float *first = sums, *second = sums + block;
  for (int64_t start = 0; start < n; start += block) {
    const int64_t length = std::min(block, n - start);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      const float centred = static_cast<float>(x[start + i]) - p.mean[i];
      const float gu = static_cast<float>(dy[start + i]) * slope<true>(centred * p.scale[i] + p.bias[i]);
      first[i] += gu; G[start+i]=gu;
      second[i] += gu * centred;
    } } }
TGT void ds(const float* G, const b* x, b* dx, int64_t n, int64_t block, float* parameters) {
  const Parameters<float> p(parameters, block);
  for (int64_t start = 0; start < n; start += block) {
    const int64_t length = std::min(block, n - start);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      const float centred = static_cast<float>(x[start + i]) - p.mean[i];
      dx[start + i] = rounded<b>(G[start+i] * p.scale[i] + (centred * p.tilt[i] + p.offset[i]));
    } } }
}
static double now(){timespec t;clock_gettime(CLOCK_THREAD_CPUTIME_ID,&t);return t.tv_sec+1e-9*t.tv_nsec;}
template<class F> double best(F f,int64_t n){double q=1e9;for(int r=0;r<80;r++){double t=now();for(int k=0;k<4;k++)f();t=now()-t;q=std::min(q,t/4/n*1e9);}return q;}
int main(){
 for(int64_t n: {int64_t(16384),int64_t(131072),int64_t(524288)}){
 std::vector<b> x(n),d(n),y(n); std::vector<float> G(n); for(int64_t i=0;i<n;i++){float f=((i*7919)%2001-1000)*0.003f; x[i]=rounded<b>(f);d[i]=rounded<b>(-f);}
 std::vector<float> p(4096,0.5f),q(4096);
 printf("n=%ld: moments %.3f write %.3f | recompute: sum %.3f dx %.3f | stored: sum %.3f dx %.3f\n",(long)n,
 best([&]{m(x.data(),n,128,p.data(),q.data());},n),best([&]{w(x.data(),y.data(),n,128,p.data());},n),
 best([&]{g(d.data(),x.data(),n,128,p.data(),q.data());},n),best([&]{dd(d.data(),x.data(),y.data(),n,128,p.data());},n),
 best([&]{gs(d.data(),x.data(),G.data(),n,128,p.data(),q.data());},n),best([&]{ds(G.data(),x.data(),y.data(),n,128,p.data());},n));
 }}
